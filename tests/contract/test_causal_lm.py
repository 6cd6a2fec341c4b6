"""Every algorithm that needs neither classes nor a head on a tiny language model: grouped, resumed, and as declared."""

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from celora import experiment
from celora.algorithms import ALGORITHMS
from celora.experiment.config import resolve
from celora.tasks.causal_lm import CausalLm
from tests.language import saved

ABLE = [name for name, kind in ALGORITHMS.items() if kind.info.needs <= CausalLm().traits]
Adapters = dict[str, dict[str, torch.Tensor]]
MORE: Mapping[str, Mapping[str, Any]] = {"fedmosaic": {"coordinates": 5}}
WORDS = ["ice is cold.", "a cat and a dog", "who is it?", "more and more of it", "rain.", "to be or not to be"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of three clients."""
    folder = tmp_path_factory.mktemp("language")
    saved(folder / "model")
    rows = [
        {"site": f"site-{at % 3}", "prompt": f"say {at % 6}: ", "completion": WORDS[(at + at % 3) % 6]}
        for at in range(36)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(name: str) -> dict[str, Any]:
    return {
        "data": {"source": "rows.jsonl", "client": "site", "max_validation": 2, "max_test": 2},
        "task": {"name": "causal-lm"},
        "model": {"backbone": "model", "device": "cpu", "max_length": 32},
        "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "train": {"lr": 1e-2, "batch_size": 2, "steps": 2},
        "plan": {"rounds": 2},
        "algorithm": {"name": name, **MORE.get(name, {})},
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
    paths = sorted(path for path in out.glob("adapters/*/*.safetensors"))
    return {f"{path.parent.name}/{path.name}": load_file(path) for path in paths}


def products(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A of plain LoRA, whose factors need not be unique; whatever else there is as it is."""
    found = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    for key, b in tensors.items():
        if ".lora_B." in key:
            found[key] = b @ tensors[key.replace(".lora_B.", ".lora_A.")]
    return found


@pytest.mark.parametrize("name", ABLE)
def test_it_learns_the_same_alone_grouped_and_resumed(name: str, folder: Path, tmp_path: Path) -> None:
    tree = settings(name)
    whole = ran(tree, folder, tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert len(whole) >= 3
    alone = ran({**tree, "engine": {"group": 1}}, folder, tmp_path / "alone")
    for client, tensors in whole.items():
        for key, tensor in products(tensors).items():
            torch.testing.assert_close(products(alone[client])[key], tensor, atol=2e-4, rtol=2e-3)
    ran(tree, folder, tmp_path / "resumed", rounds=1)
    list(experiment.resume(tmp_path / "resumed"))
    again = adapters(tmp_path / "resumed")
    assert all(torch.equal(again[client][key], whole[client][key]) for client in whole for key in whole[client])
    resumed = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    assert resumed["clients"] == summary["clients"]
