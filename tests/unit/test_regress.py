"""celora.tasks.regress: numbers in the user's units, metrics as scipy computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import celora
from celora import experiment
from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.data.table import Table
from celora.errors import ConfigError, DataError
from celora.experiment.config import resolve
from celora.models import families
from celora.models.backbone import load
from celora.models.batching import BatchedForward
from celora.models.export import export_shared
from celora.models.learner import ModelLearner
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tasks.regress import Regress, correlation
from celora.tensors import only
from tests.facts.test_models import TEXTS, run_readme
from tests.unit.test_solve import close


def table(*labels: str) -> Any:
    texts: Any = ["a text " * (at + 1) for at in range(len(labels))]
    return Table(texts, list(labels), None, None, [f"a.csv:{at + 2}" for at in range(len(labels))])


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scipys_in_the_units_of_the_labels(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 6, (40,), generator=draw).double()  # with ties
    outputs = torch.randn(40, generator=draw).round(decimals=1)
    task = Regress(mean=2.5, scale=1.5)
    outcomes = task.outcomes(outputs, {"y": ((y - 2.5) / 1.5).float()})
    found, answers = task.measure(outcomes), torch.tensor(task.answers(outputs)).double()
    assert found["mse"] == pytest.approx((answers - y).square().mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(found["mse"] / 1.5**2)
    assert found["pearson"] == pytest.approx(stats.pearsonr(answers, y).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(answers, y).statistic, abs=1e-6)


def test_what_does_not_vary_has_no_correlation() -> None:
    assert correlation(torch.full((3,), 0.1), torch.arange(3.0)) == 0.0
    assert correlation(torch.tensor([1.0]), torch.tensor([2.0])) == 0.0
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 4.0])) == pytest.approx(-1)


def test_the_score_is_the_metric_that_was_chosen_and_so_is_the_baseline() -> None:
    train, test = {"y": torch.tensor([0.0, 2.0])}, {"y": torch.tensor([1.0, 3.0])}
    assert Regress(scale=10).baseline(train, test) == pytest.approx(2 * 100)
    assert Regress(scale=10, score="loss").baseline(train, test) == pytest.approx(2)
    assert Regress(score="spearman").baseline(train, test) is None
    assert [Regress(score="pearson").headline.name, Regress().headline.name] == ["pearson", "mse"]
    assert Regress(score="pearson").headline.higher_is_better and not Regress().headline.higher_is_better
    with pytest.raises(ConfigError, match=r"task\.scale"):
        resolve({"task": {"name": "regress", "scale": 0}}, Path())


@pytest.mark.parametrize("label", ["many", "nan", "inf"])
def test_a_label_that_is_no_number_is_named_with_its_row(label: str) -> None:
    with pytest.raises(DataError, match=f"a.csv:3: found the label '{label}', expected a number such as 3.5"):
        Regress().read(table("1", label), None)  # type: ignore[arg-type]  # no network is asked


def test_a_fit_is_the_same_alone_and_together() -> None:
    task, backbone = Regress(mean=3, scale=2), load(Model(device="cpu"), Adapter(layers="last:1"), Path())
    network = AdaptedBackbone(backbone, Lora(), budget=1 << 20)
    examples = task.read(table("1", "2.5", "7", "-3", "4"), network)
    assert examples.targets([0, 3])["y"].tolist() == [-1, -3]
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


def test_the_code_of_an_exports_readme_answers_in_the_units_of_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter, task = Model(device="cpu"), Adapter(layers="last:1"), Regress(mean=3, scale=2)
    backbone = load(model, adapter, tmp_path)
    models = SharedBackbone(backbone, task, model=model, adapter=adapter, family=Lora(), seed=0)
    draw = torch.Generator().manual_seed(2)
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=draw) for name, w in models.initial.items()}
    export_shared(
        tmp_path / "out", backbone, weights, family=Lora(), card=task.model_card(), model=model, adapter=adapter
    )
    theirs = run_readme(tmp_path / "out", monkeypatch)["y"]
    assert models.answers("a", weights, TEXTS) == pytest.approx(theirs.tolist(), abs=1e-4)


def test_a_run_on_numbers_and_pairs_goes_from_files_to_predictions(tmp_path: Path) -> None:
    lines = [f"text {n},pair {n % 3},{n % 5 / 2}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,other,label", *lines]))
    tree: dict[str, Any] = {
        "data": {"source": "rows.csv", "columns": {"pair": "other"}, "clients": 2},
        "task": {"name": "regress", "score": "spearman", "mean": 1, "scale": 0.7},
        "model": {"device": "cpu"},
        "adapter": {"layers": "last:1"},
        "plan": {"rounds": 1},
        "algorithm": {"name": "fedit"},
    }
    list(experiment.run(resolve(tree, tmp_path), tmp_path / "run", twin=False))
    (answer,) = celora.load(tmp_path / "run")["client-00"].predict([("text 3", "pair 0")])
    assert isinstance(answer, float)
