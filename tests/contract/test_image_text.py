"""Algorithms on tiny models of images and texts: grouped as alone, resumed bit by bit, sending what they declare."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from celora import experiment
from celora.experiment.config import resolve
from tests.image_text import saved_dual, saved_seeing, write_pictures

ALGORITHMS = ("fedit", "ffa-lora", "fedsa-lora", "fed-sb", "ce-lora")
SENT = {"fedit": ("A", "B"), "ffa-lora": ("B",), "fedsa-lora": ("A",), "fed-sb": ("C",), "ce-lora": ("C",)}
Adapters = dict[str, dict[str, torch.Tensor]]
RANK = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and pictures of three clients."""
    folder = tmp_path_factory.mktemp("image-text")
    write_pictures(folder / "rows.parquet")
    saved_dual(folder / "clip", "clip")
    saved_seeing(folder / "llava", "llava")
    return folder


def settings(name: str, task: str) -> dict[str, Any]:
    return {
        "data": {"source": "rows.parquet", "image": "image", "client": "site", "max_validation": 2, "max_test": 2},
        "task": {"name": task, "score": "loss"},
        "model": {"backbone": {"contrast": "clip", "caption": "llava"}[task], "device": "cpu", "max_length": 32},
        "adapter": {"rank": RANK, "targets": ["q_proj", "v_proj"]},
        "train": {"lr": 1e-2, "batch_size": 4, "steps": 2},
        "plan": {"rounds": 2},
        "algorithm": {"name": name},
    }


def ran(tree: dict[str, Any], base: Path, out: Path, *, rounds: int | None = None) -> Adapters:
    """Client -> its exported adapter; `rounds`: stopped after so many, as a killed process is."""
    events = experiment.run(resolve(tree, base), out, twin=False)
    if rounds is not None:
        list(takewhile(lambda event: event.get("index") != rounds or event["event"] != "round", events))
        events.close()
        return {}
    list(events)
    return adapters(out)


def adapters(out: Path) -> Adapters:
    return {str(path.relative_to(out)): load_file(path) for path in sorted(out.glob("adapters/*/*.safetensors"))}


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A of plain LoRA, whose factors need not be unique; whatever else there is as it is."""
    found = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    for key, b in tensors.items():
        if ".lora_B." in key:
            found[key] = b @ tensors[key.replace(".lora_B.", ".lora_A.")]
    return found


@pytest.mark.parametrize("task", ["contrast", "caption"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_the_same_alone_grouped_and_resumed_and_sends_what_it_declares(
    name: str, task: str, folder: Path, tmp_path: Path
) -> None:
    tree = settings(name, task)
    whole = ran(tree, folder, tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert len(whole) == 3
    alone = ran({**tree, "engine": {"group": 1}}, folder, tmp_path / "alone")
    for client, tensors in whole.items():
        assert any(tensor.abs().max() > 0 for tensor in products(tensors).values())
        for key, tensor in products(tensors).items():
            torch.testing.assert_close(products(alone[client])[key], tensor, atol=2e-4, rtol=2e-3)
    ran(tree, folder, tmp_path / "resumed", rounds=1)
    list(experiment.resume(tmp_path / "resumed"))
    again = adapters(tmp_path / "resumed")
    assert all(torch.equal(again[client][key], whole[client][key]) for client in whole for key in whole[client])
    assert json.loads((tmp_path / "resumed" / "summary.json").read_text())["clients"] == summary["clients"]
    modules = [key for key in next(iter(whole.values())) if ".lora_A." in key]
    sizes = {"A": RANK * 16, "B": 16 * RANK, "C": RANK**2}  # all modules are 16 × 16
    assert summary["bytes"]["up_payload"] == 4 * len(modules) * sum(sizes[part] for part in SENT[name])
    assert summary["bytes"]["head"] == 0
