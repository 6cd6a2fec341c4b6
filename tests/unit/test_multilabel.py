"""celora.tasks.multilabel: any number of classes for a row, metrics as scikit-learn computes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.data import Data, read
from celora.errors import DataError
from celora.models import families
from celora.models.backbone import load
from celora.models.batching import BatchedForward
from celora.models.export import export_shared
from celora.models.learner import ModelLearner
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tasks.multilabel import MultiLabel
from celora.tensors import only
from tests.facts.test_models import TEXTS, run_readme
from tests.unit.test_solve import close

ROWS: list[dict[str, Any]] = [
    {"text": "A film of love and war", "labels": ["love", "war"]},
    {"text": "A film of love", "labels": ["love"]},
    {"text": "Nothing at all, and that for a rather long time of which nobody knows the end", "labels": []},
    {"text": "War, and war again", "labels": ["war"]},
    {"text": "Laughter", "labels": ["comedy", "love"]},
]


def listed(tmp_path: Path, rows: Any = ROWS) -> Any:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read(Data(source="rows.jsonl"), tmp_path, MultiLabel().forms)


def agreed(table: Any, **settings: Any) -> MultiLabel:
    task = MultiLabel(**settings)
    return task.agreed(task.merge(b"", task.propose(table)))


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scikit_learns(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 5, generator=draw), (torch.rand(40, 5, generator=draw) < 0.3).float()
    logits[:, 3], labels[:, 3] = -1, 0  # neither answered nor true
    labels[:20], task = (logits[:20] > 0).float(), MultiLabel(classes=tuple("abcde"))
    found, answers = task.measure(task.outcomes(logits, {"labels": labels})), logits > 0
    assert found["micro_f1"] == pytest.approx(f1_score(labels, answers, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro", zero_division=np.nan))
    assert found["subset_accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert found["loss"] == pytest.approx(torch.nn.BCEWithLogitsLoss()(logits, labels).item())
    nothing = task.measure(task.outcomes(-torch.ones(2, 5), {"labels": torch.zeros(2, 5)}))
    assert (nothing["micro_f1"], nothing["macro_f1"], nothing["subset_accuracy"]) == (0, 0, 1)


def test_labels_are_lists_or_one_text_with_a_separator(tmp_path: Path) -> None:
    lists = listed(tmp_path)
    lines = [f'"{row["text"]}",{" ; ".join(row["labels"])}' for row in ROWS]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    texts = read(Data(source="rows.csv"), tmp_path, MultiLabel(separator=";").forms)
    network = AdaptedBackbone(load(Model(device="cpu"), Adapter(layers="last:1"), Path()), Lora(), budget=1 << 20)
    found = []
    for table, separator in ((lists, None), (texts, ";")):
        task = agreed(table, separator=separator)
        assert task.facts == {"classes": ["comedy", "love", "war"]}
        examples = task.read(table, network)
        assert examples.targets(range(5))["labels"].tolist() == [[0, 1, 1], [0, 1, 0], [0] * 3, [0, 0, 1], [1, 1, 0]]
        found.append([row.tolist() for row in network.read(table.inputs).fetch(range(5))])
    assert found[0] == found[1] == network.backbone.tokenize([row["text"] for row in ROWS])
    assert task.answers(torch.tensor([[1.0, -1, 2], [-1, -1, -1]])) == [["comedy", "war"], []]


def test_labels_that_are_no_lists_and_rows_without_any_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: found labels = 'love', expected a list of names.*separator"):
        MultiLabel().propose(listed(tmp_path, [ROWS[0], {"text": "x", "labels": "love"}]))
    with pytest.raises(DataError, match=r"no row has any label; expected lists in the column `columns\.labels`"):
        MultiLabel().propose(listed(tmp_path, [{"text": "x"}]))
    with pytest.raises(DataError, match=r"found the label 'comedy', which task\.classes does not list"):
        MultiLabel(classes=("love", "war")).propose(listed(tmp_path))


def test_the_baseline_is_the_most_frequent_set_of_labels() -> None:
    train, test = ({"labels": torch.tensor(rows)} for rows in ([[1.0, 0], [1, 0], [0, 1]], [[1.0, 0], [1, 1]]))
    assert MultiLabel(score="subset_accuracy").baseline(train, test) == 0.5
    assert MultiLabel().baseline(train, test) is None


def test_a_fit_is_the_same_alone_and_together(tmp_path: Path) -> None:
    backbone, table = load(Model(device="cpu"), Adapter(layers="last:1"), Path()), listed(tmp_path)
    task, network = agreed(table), AdaptedBackbone(backbone, Lora(), budget=1 << 20)
    examples = task.read(table, network)
    weights = families.initial(backbone.targets, Adapter(rank=4), Lora(), task.head(network.width), seed=0)
    draw = torch.Generator().manual_seed(1)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
    forward, recipe = BatchedForward(network, task), Recipe(batch_size=3, steps=3)

    def learners() -> list[ModelLearner]:
        return [
            ModelLearner(forward, {"train": Rows(examples, at)}, weights, recipe, seed=0, client=str(at), round=1)
            for at in ([0, 1, 2], [2, 3, 4, 1, 0])
        ]

    asked = [(it, Fit({}, only("B", "head"))) for it in learners()]
    for found, it in zip(Fit.together(asked, forward), learners(), strict=True):  # type: ignore[arg-type]
        alone = Fit({}, only("B", "head")).alone(it)
        assert not isinstance(found, Exception)
        assert found.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-5)
        close(found.weights, alone.weights)


def test_the_code_of_an_exports_readme_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, task = Model(device="cpu"), Adapter(layers="last:1"), MultiLabel(classes=("love", "war"))
    backbone = load(model, adapter, tmp_path)
    models = SharedBackbone(backbone, task, model=model, adapter=adapter, family=Lora(), seed=0)
    draw = torch.Generator().manual_seed(2)
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=draw) for name, w in models.initial.items()}
    export_shared(
        tmp_path / "out", backbone, weights, family=Lora(), card=task.model_card(), model=model, adapter=adapter
    )
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    assert (models.predict("a", weights, TEXTS) - theirs).abs().max() < 1e-5
