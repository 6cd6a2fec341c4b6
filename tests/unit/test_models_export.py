"""celora.models.export: what is written comes back, and only whole folders are seen."""

import json
from pathlib import Path

import pytest
import torch

from celora.core.adapters import Tri
from celora.errors import RunFolderError
from celora.models.backbone import load
from celora.models.export import export_peft, replacing
from celora.models.export import load as load_adapters
from celora.models.export import save as save_adapters
from celora.models.settings import Adapter, Model
from celora.tasks.classify import Classify
from tests.classifier import initial


def test_every_clients_weights_come_back_bit_by_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    clients = {
        "site/α": {"m.A": shared, "m.B": shared.T, "head.bias": torch.zeros(2)},
        "Site α": {"m.A": shared[:2], "m.C": torch.eye(2, dtype=torch.bfloat16)},
        "..": {"m.A": torch.zeros(0, 3)},
        "x" * 300: {"m.A": shared},
    }
    save_adapters(tmp_path / "all", clients)
    found = load_adapters(tmp_path / "all")
    assert list(found) == list(clients)
    for client, weights in clients.items():
        assert all(torch.equal(found[client][name], w) for name, w in weights.items())
        assert {name: w.dtype for name, w in found[client].items()} == {n: w.dtype for n, w in weights.items()}


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    save_adapters(tmp_path / "all", {"a": {"m.A": torch.ones(1)}, "b": {"m.A": torch.ones(1)}})
    save_adapters(tmp_path / "all", {"c": {"m.A": torch.ones(1)}})
    assert list(load_adapters(tmp_path / "all")) == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_a_failed_write_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    save_adapters(tmp_path / "all", {"a": {"m.A": torch.ones(1)}})
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "all") as new:
        (new / "half" / "written").write_text("x")
    assert list(load_adapters(tmp_path / "all")) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no adapters"):
        load_adapters(tmp_path / "nowhere")
    save_adapters(tmp_path / "all", {"a": {"m.A": torch.ones(1000)}})
    (path,) = (tmp_path / "all").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="is damaged"):
        load_adapters(tmp_path / "all")


def test_an_export_tells_what_it_is(tmp_path: Path) -> None:
    model = Model(backbone="random-vit", device="cpu", pooling="cls")
    adapter = Adapter(targets=r".*1\..*(q|v)_proj", rank=3, alpha=6)
    backbone = load(model, adapter, tmp_path)
    weights, card = initial(backbone, adapter, Tri(), 2, seed=0), Classify(classes=("no", "yes")).model_card()
    export_peft(tmp_path / "out", backbone, weights, family=Tri(), card=card, model=model, adapter=adapter)
    about = json.loads((tmp_path / "out" / "celora.json").read_text())
    assert about["classes"] == ["no", "yes"]
    assert about["pooling"] == "cls"
    assert about["fingerprint"] == backbone.fingerprint()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert sorted(config["target_modules"]) == ["layers.1.attention.q_proj", "layers.1.attention.v_proj"]
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 12
