"""Pairs of texts on real data: GLUE's RTE, with the configuration of examples/rte.toml."""

import csv
import json
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from celora import experiment
from celora.experiment.population import ResourceCache
from celora.experiment.trained import load

RTE = Path(__file__).parents[3] / "shared" / "data" / "rte"
EXAMPLE = Path(__file__).parents[2] / "examples" / "rte.toml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RTE.exists(), reason=f"there is no {RTE}: the data set is not part of the project"),
]


def test_the_example_learns_real_pairs_and_its_models_predict_them(tmp_path: Path) -> None:
    tree: dict[str, Any] = tomllib.loads(EXAMPLE.read_text())
    tree["data"] |= {name: str(RTE / Path(tree["data"][name]).name) for name in ("source", "test")}
    tree["data"] |= {"rows": 24, "max_test": 24, "max_validation": 12}
    tree["adapter"], tree["model"]["device"] = {"layers": "last:2"}, "cpu"
    given = experiment.resolve(tree, tmp_path)
    list(experiment.run(given, tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["moment"] == "train"]
    losses = [fmean(float(row["loss"]) for row in rows if int(row["round"]) == number) for number in (1, 4)]
    assert losses[1] < losses[0]
    federation = ResourceCache().federation(given)
    assert len(federation.table) == 2490 + 277
    for client, model in load(tmp_path / "run").items():
        at = federation.clients[client].test
        pairs = [federation.table.inputs[row] for row in at]
        answers = model.predict([(pair["text"], pair["pair"]) for pair in pairs])
        hits = [answer == federation.table.labels[row] for answer, row in zip(answers, at, strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(summary["clients"][client]["score"])
        assert set(answers) <= {"entailment", "not_entailment"}
