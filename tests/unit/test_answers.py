"""examples/answers.py: what each client's language model answers before and after."""

import json
import runpy
from pathlib import Path

import pytest

from celora import experiment
from celora.experiment.config import resolve
from celora.experiment.population import ResourceCache
from celora.experiment.trained import load
from tests.language import saved

SCRIPT = Path(__file__).parents[2] / "examples" / "answers.py"
SAID = {"cats": "a cat", "dogs": "a dog"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two clients, each of which has learned to give one answer to whatever it is asked."""
    saved(tmp_path / "model")
    rows = [{"site": site, "prompt": f"say {n}: ", "completion": said} for site, said in SAID.items() for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "data": {"source": "rows.jsonl", "client": "site"},
        "task": {"name": "causal-lm"},
        "model": {"backbone": "model", "device": "cpu", "max_length": 32},
        "adapter": {"rank": 8, "targets": "all-linear"},
        "train": {"lr": 2e-2, "batch_size": 4, "steps": 40},
        "plan": {"rounds": 1},
        "algorithm": {"name": "local"},
    }
    list(experiment.run(resolve(tree, tmp_path), tmp_path / "run", twin=False))
    return tmp_path / "run"


def test_each_client_is_asked_its_first_test_row_and_answers_as_the_frozen_model_and_as_its_own(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(SCRIPT))["main"](str(run))
    first, second = (block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n"))
    population = ResourceCache().population(load(run).experiment)
    for (site, said), lines in zip(SAID.items(), (first, second), strict=True):
        row = population.federation.table.inputs[population.federation.clients[site].test[0]]
        (frozen,) = population.models.answers(site, {}, [row["prompt"]])
        assert lines[0] == f"{site}: {row['prompt']}"
        assert lines[1].split("  ")[-1] == said
        assert " ".join(lines[2:]).split() == ["before", *frozen.split(), "after", *said.split()]
