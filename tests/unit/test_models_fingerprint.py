"""A backbone's fingerprint: of the tensors in its files, however they are cut and whoever saved them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from celora.errors import ModelError
from celora.models.backbone import load
from celora.models.fingerprint import MARK, of_files
from celora.models.settings import Adapter, Model
from tests import language


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return language.saved(tmp_path / "whole")


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.parent / name))


def test_shards_do_not_count(folder: Path) -> None:
    cut = copied(folder, "cut")
    weights = load_file(cut / "model.safetensors")
    (cut / "model.safetensors").unlink()
    where = {
        name: f"model-0000{at % 3 + 1}-of-00003.safetensors" for at, name in enumerate(sorted(weights, reverse=True))
    }
    for shard in sorted(set(where.values())):
        save_file({name: weights[name] for name in weights if where[name] == shard}, cut / shard)
    (cut / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    save_file({"other": torch.zeros(2)}, cut / "adapter_model.safetensors")  # transformers does not load it, either
    assert of_files(cut, "float32") == of_files(folder, "float32")
    loaded = load(Model(backbone=str(cut), device="cpu"), Adapter(targets=("q_proj",)), Path(), "causal-lm")
    assert loaded.fingerprint() == of_files(folder, "float32")


def test_one_number_another_name_shape_or_dtype_is_another_backbone(folder: Path) -> None:
    found = {of_files(folder, "float32")}
    weights = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    changed = {
        "number": {**weights, name: weights[name] + torch.eye(16)[3] * 1e-6},
        "name": {(f"{one}.x" if one == name else one): tensor for one, tensor in weights.items()},
        "shape": {**weights, name: weights[name].reshape(4, 4)},
        "dtype": {**weights, name: weights[name].bfloat16()},
        "gone": {one: tensor for one, tensor in weights.items() if one != name},
    }
    for kind, tensors in changed.items():
        save_file(tensors, copied(folder, kind) / "model.safetensors", metadata={"format": "pt"})
        found.add(of_files(folder.parent / kind, "float32"))
    assert len(found) == 6
    assert all(one.startswith(MARK) and len(one) == len(MARK) + 64 for one in found)


def test_the_configuration_counts_but_for_how_it_was_saved(folder: Path) -> None:
    other = copied(folder, "other")
    config = json.loads((other / "config.json").read_text())
    saved = {"transformers_version": "4.0", "dtype": "float16", "architectures": ["Other"], "_name_or_path": "x"}
    (other / "config.json").write_text(json.dumps(dict(reversed((config | saved).items()))))
    assert of_files(other, "float32") == of_files(folder, "float32")
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert of_files(other, "float32") != of_files(folder, "float32")


def test_what_becomes_of_the_weights_counts(folder: Path) -> None:
    def loaded(**settings: str) -> str:
        model = Model(**{"backbone": str(folder), "device": "cpu", **settings})
        return load(model, Adapter(targets=("q_proj",)), Path(), "causal-lm").fingerprint()

    assert loaded() == of_files(folder, "float32")
    assert loaded(dtype="bfloat16") == of_files(folder, "bfloat16") != loaded()


def test_files_of_another_kind_are_taken_byte_by_byte(folder: Path) -> None:
    other = copied(folder, "bin")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    assert of_files(other, "float32") == of_files(folder, "float32")  # transformers takes safetensors where there are
    (other / "model.safetensors").unlink()
    first = of_files(other, "float32")
    assert first != of_files(folder, "float32")
    torch.save({}, other / "pytorch_model.bin")
    assert of_files(other, "float32") != first


def test_a_folder_without_weights_or_with_damaged_ones_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"whole cannot be read for its fingerprint: "):
        of_files(folder, "float32")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"found none of model\.safetensors, pytorch_model\.bin"):
        of_files(folder, "float32")


def test_backbones_that_are_made_here_keep_the_fingerprint_they_had() -> None:
    vit = load(Model(backbone="random-vit", device="cpu"), Adapter(targets=("q_proj",)), Path())
    assert vit.fingerprint() == "88c7622a10a7a5db908b875a1d1caa36c05c66a4c35119811ed6a4d601a45162"
