"""celora.models.export: what is written comes back, and only whole folders are seen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from celora.core.adapters import Tri
from celora.errors import ModelError, RunFolderError
from celora.models import stock
from celora.models.backbone import load
from celora.models.export import export_shared, load_export, replacing
from celora.models.settings import Adapter, Model
from celora.tasks.classify import Classify
from tests.classifier import initial


def test_writing_again_replaces_the_folder(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with replacing(tmp_path / "all") as folder:
            (folder / name).write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["all", "all/new"]


def test_what_is_written_can_be_read_by_others(tmp_path: Path) -> None:
    with replacing(tmp_path / "all") as folder:
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")} == {
        "all": 0o755,
        "model.safetensors": 0o644,
    }


def test_a_failed_write_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    with replacing(tmp_path / "all") as folder:
        (folder / "old").write_text("x")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "all") as folder:
        (folder / "half" / "written").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["all", "all/old"]


def test_a_folder_in_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(RunFolderError, match=r"cannot write .*file/a: File exists: choose another folder"),
        replacing(tmp_path / "file" / "a"),
    ):
        pass


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no adapter of celora's"):
        load_export(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(RunFolderError, match=r"adapter_model\.safetensors is damaged"):
        load_export(tmp_path)


def test_an_export_tells_what_it_is(tmp_path: Path) -> None:
    model = Model(backbone="random-vit", device="cpu", pooling="cls")
    adapter = Adapter(targets=r".*1\..*(q|v)_proj", rank=3, alpha=6)
    backbone = load(model, adapter, tmp_path)
    weights, card = initial(backbone, adapter, Tri(), 2, seed=0), Classify(classes=("no", "yes")).model_card()
    export_shared(tmp_path / "out", backbone, weights, family=Tri(), card=card, model=model, adapter=adapter)
    about = json.loads((tmp_path / "out" / "celora.json").read_text())
    assert about["classes"] == ["no", "yes"]
    assert about["pooling"] == "cls"
    assert about["fingerprint"] == backbone.fingerprint()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert sorted(config["target_modules"]) == ["layers.1.attention.q_proj", "layers.1.attention.v_proj"]
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 12


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1.0), (torch.float32, 10.0), (torch.bfloat16, 1.0)])
def test_a_model_that_changes_nothing_is_no_export_however_much_may_differ(dtype: torch.dtype, rounding: float) -> None:
    """Training moves hidden states by half of what may differ."""
    draw = torch.Generator().manual_seed(0)
    frozen = torch.randn(2, 3, 4, generator=draw)
    frozen[0, 0, 0] = 10.0
    trained = frozen.clone()
    loose = rounding > 1 or dtype != torch.float32
    trained[1, 2, 3] += 0.5 * rounding * stock.NEAR[dtype] * 10 if loose else 1.0
    backbone: Any = SimpleNamespace(dtype=dtype, head=None, name="tiny", put_out=lambda states, rows: states)
    of = stock.Trial(backbone, None, {}, trained, lambda: frozen)

    of.check(trained, "it", rounding=rounding)
    of.check(trained + 1e-6 * torch.randn(2, 3, 4, generator=draw), "it", rounding=rounding)
    with pytest.raises(ModelError, match="it changes nothing"):
        of.check(frozen, "it", rounding=rounding)
    with pytest.raises(ModelError, match="it gives hidden states of tiny that differ by"):
        of.check(trained + 9, "it", rounding=rounding)
