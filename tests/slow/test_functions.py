"""The examples whose rows are made of the libraries' own documentation: tags, several labels, and numbers."""

import csv
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from celora import experiment
from celora.experiment.trained import load
from tests.facts.test_models import TEXTS, run_readme

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [["some", "words"], ["and", "others"]]  # as in the README of an export
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/functions.py writes."""
    folder = tmp_path_factory.mktemp("rows")
    subprocess.run([sys.executable, EXAMPLES / "functions.py", folder], check=True)
    return folder


@pytest.mark.parametrize("name", ["tag", "multi-label", "regress"])
def test_an_example_learns_and_its_exports_give_the_same_answers(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tree: dict[str, Any] = tomllib.loads((EXAMPLES / f"{name}.toml").read_text())
    tree["data"] |= {"source": str(rows / tree["data"]["source"]), "rows": 48, "max_test": 24, "max_validation": 24}
    tree["model"]["device"], tree["plan"] = "cpu", {"rounds": 4}
    list(experiment.run(experiment.resolve(tree, tmp_path), tmp_path / "run"))
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        scored = [(row["moment"], int(row["round"]), row["score"]) for row in csv.DictReader(file) if row["score"]]
    untrained = fmean(float(score) for moment, number, score in scored if (moment, number) == ("received", 1))
    trained = fmean(float(score) for moment, number, score in scored if (moment, number) == ("personal", 4))
    assert trained > untrained + 0.1
    for client, model in load(tmp_path / "run").items():
        theirs = run_readme(tmp_path / "run" / "adapters" / client, monkeypatch)
        if name == "tag":
            ours = model.outputs(WORDS)
            numbers = [theirs["inputs"].word_ids(row) for row in range(2)]
            found = torch.stack(
                [theirs["logits"][row, [ids.index(0), ids.index(1)]] for row, ids in enumerate(numbers)]
            )
        elif name == "multi-label":
            ours, found = model.outputs(TEXTS), theirs["logits"]
        else:
            ours, found = torch.tensor(model.predict(TEXTS)), theirs["y"]
        assert (found - ours).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)
