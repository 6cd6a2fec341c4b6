"""The main job on real text: MiniLM, docstrings, a handful of clients."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from celora.cli import app

pytestmark = pytest.mark.slow

CONFIG = """
[data]
source = "docstrings"
partition = "dirichlet"
alpha = 1.0
clients = 4
rows = 24
max_validation = 20
max_test = 40

[train]
lr = 6e-3

[plan]
rounds = 6
evaluate_every = 3
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.toml").write_text(CONFIG)
    words = [
        "compare",
        str(folder / "text.toml"),
        "--algorithms",
        "fedit,ce-lora",
        "--out",
        str(folder / "run"),
        "--json",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    return folder / "run", json.loads(result.stdout)


def test_training_on_text_learns_and_stands_far_above_the_majority_class(compared: Any) -> None:
    for summary in compared[1]:
        clients = summary["clients"].values()
        majority = sum(row["majority"] for row in clients) / len(clients)
        assert summary["metrics"]["mean"] > majority + 0.05, summary["algorithm"]


def test_the_payload_on_minilm_is_exactly_what_the_papers_count(compared: Any) -> None:
    _, fedit, ce_lora = compared[1]
    assert ce_lora["bytes"]["up_payload"] == 12 * 64 * 4
    assert ce_lora["bytes"]["total"]["up_payload"] == 4 * 6 * 12 * 64 * 4
    assert fedit["bytes"]["up_payload"] == 12 * 8 * (384 + 384) * 4
    assert ce_lora["bytes"]["head"] == 0
    assert fedit["bytes"]["head"] == 12 * 385 * 4
    assert ce_lora["bytes"]["up_frame"] - ce_lora["bytes"]["summary"] / 6 < 1.05 * 12 * 64 * 4


def test_a_second_run_is_equal_bit_by_bit(compared: Any, tmp_path: Path) -> None:
    folder, (_, _, ce_lora) = compared
    words = ["run", str(folder / "ce-lora" / "config.toml"), "--out", str(tmp_path / "again"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    again = json.loads(result.stdout)
    for key in ("metrics", "moments", "last", "clients", "bytes"):
        assert again[key] == ce_lora[key], key
