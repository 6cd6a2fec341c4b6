"""pFedLoRA on real data: five networks on CIFAR-10, encoders of three depths on reviews, each model its client's own.

The data sets lie outside the project: in the folder that CELORA_DATA names, or in shared/data beside the checkout.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from celora.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CELORA_DATA") or ROOT.parent / "shared" / "data")
TEXT = """
[data]
source = "{source}"
client = "domain"
rows = 16
max_validation = 10
max_test = 10
[model]
own = ["minilm:2", "minilm:4", "minilm:6"]
max_length = 32
[train]
lr = 2e-4
[plan]
rounds = 1
[algorithm]
name = "pfedlora"
"""


def file_of(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"there is no {path}: set CELORA_DATA to the folder that holds {name}")
    return path


def ran(config: Path, out: Path, *sets: str) -> dict[str, Any]:
    words = ["run", str(config), "--out", str(out), "--json", *(word for one in sets for word in ("--set", one))]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def test_five_networks_on_cifar_10_learn_together_and_only_their_adapter_travels(tmp_path: Path) -> None:
    """Two of ten classes a client: to answer the more frequent one always is right half the time."""
    source = file_of("cifar10/test.parquet")  # 10,000 of the images, read in a second
    sets = (f"data.source={source}", "data.clients=5", "data.rows=200", "plan.rounds=3")
    summary = ran(ROOT / "examples" / "pfedlora.toml", tmp_path / "run", *sets)
    assert summary["metrics"]["mean"] > 0.65
    adapter = 8 * (500 + 10) * 4
    assert (summary["bytes"]["up_payload"], summary["bytes"]["head"]) == (adapter, 0)
    folders = sorted((tmp_path / "run" / "adapters").iterdir())
    models = [load_file(folder / "model.safetensors") for folder in folders]
    assert [json.loads((f / "celora.json").read_text())["architecture"] for f in folders] == [
        "cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5",
    ]  # fmt: skip
    assert len({tuple(model["own.fc1.weight"].shape) for model in models}) == 5
    assert {tuple(model["fc.A"].shape) for model in models} == {(8, 500)}


def test_encoders_of_unlike_depth_share_an_adapter_on_text(tmp_path: Path) -> None:
    source = file_of("multidomain_sentiment/train.parquet")
    (tmp_path / "text.toml").write_text(TEXT.format(source=source))
    summary = ran(tmp_path / "text.toml", tmp_path / "run")
    assert (summary["bytes"]["up_payload"], summary["bytes"]["head"]) == (8 * (384 + 2) * 4, 0)
    depths = []
    for folder in sorted((tmp_path / "run" / "adapters").iterdir()):
        names = load_file(folder / "model.safetensors")
        depths.append(len({name.split(".")[4] for name in names if ".encoder.layer." in name}))
    assert sorted(depths) == [2, 2, 4, 4, 6]  # five domains
