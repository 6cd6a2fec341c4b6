"""celora.core.task and celora.tasks: classification, and that another task is one class and a line in a table."""

import csv
import json
import math
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from celora import experiment
from celora.algorithms import ALGORITHMS
from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.metrics import ACCURACY, LOSS
from celora.core.problems import Fit, Gradient
from celora.core.reading import Columns
from celora.core.rounds import run_rounds
from celora.data.table import Table
from celora.engines.embedded import Embedded
from celora.engines.remote import ClientFacts, JobStart
from celora.errors import ConfigError, DataError, WireError
from celora.experiment.client import Join, SiteData, enter
from celora.experiment.config import dump, resolve
from celora.experiment.population import ResourceCache
from celora.experiment.server import SiteRuntime
from celora.models import families
from celora.models.backbone import Backbone, load
from celora.models.batching import BatchedForward
from celora.models.learner import ModelLearner
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone
from celora.tasks import TASKS
from celora.tasks.classes import Classes
from celora.tasks.classify import Classify
from celora.tensors import but, only
from celora.track.folder import RunFolder
from celora.wire import Schema, pack
from tests.other_tasks import Level, Regress, Words
from tests.unit.test_solve import close

DIGITS: dict[str, Any] = {
    "data": {"source": "digits", "clients": 3, "rows": 16, "max_validation": 8, "max_test": 8, "partition": "iid"},
    "model": {"backbone": "random-vit", "device": "cpu"},
    "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"], "layers": "last:1"},
    "train": {"lr": 1e-2, "batch_size": 4},
    "plan": {"rounds": 2},
    "algorithm": {"name": "fedit"},
}


def columns(*labels: str) -> Columns:
    return Table(["a text"] * len(labels), list(labels), None, None, ["a:1"] * len(labels))


# --- classification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 7, generator=draw), torch.randint(0, 5, (40,), generator=draw)  # 5, 6: never true
    task = Classify(classes=tuple("abcdefg"))
    outcomes = torch.cat(
        [task.outcomes(logits[at], {"labels": labels[at]}) for at in (slice(0, 1), slice(1, 25), slice(25, 40))]
    )
    found = task.measure(outcomes)
    answers = logits.argmax(1)
    assert found["accuracy"] == pytest.approx((answers == labels).double().mean().item())
    assert found["macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro", zero_division=0))
    seen = [bool((labels == k).any()) for k in answers.tolist()]
    assert not all(seen)  # scikit-learn warns of answers that are never true, and counts them as misses as we do
    recall = [(answers[labels == k] == k).double().mean().item() for k in labels.unique().tolist()]
    assert found["balanced_accuracy"] == pytest.approx(sum(recall) / len(recall))
    inside = answers < 5
    assert task.measure(outcomes[inside])["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels[inside], answers[inside])
    )
    assert found["loss"] == torch.nn.functional.cross_entropy(logits, labels).item()  # to the bit


def test_the_score_is_the_metric_that_was_chosen_and_so_is_the_baseline() -> None:
    train, test = ({"labels": torch.tensor(ids)} for ids in ([0, 0, 1], [0, 0, 0, 1]))
    found = {name: Classify(score=name, classes=("a", "b")).baseline(train, test) for name in ("accuracy", "macro_f1")}
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((6 / 7 + 0) / 2)}
    by_loss = Classify(score="loss", classes=("a", "b"))
    assert by_loss.baseline(train, test) is None
    assert (by_loss.headline, Classify().headline) == (LOSS, ACCURACY)


def test_the_agreement_holds_the_labels_of_all_in_whatever_order_they_come() -> None:
    task = Classify()
    proposals = [task.propose(columns(*labels)) for labels in ("ab", "cb", "")]
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        agreement = b""
        for at in order:
            agreement = task.merge(agreement, proposals[at])
        found.append(agreement)
    assert found[0] == found[1] == pack(Classes(("a", "b", "c")))
    agreed = task.agreed(found[0])
    assert agreed.facts == {"classes": ["a", "b", "c"]}
    assert {name: of.shape for name, of in agreed.head(5).items()} == {"head.weight": (3, 5), "head.bias": (3,)}
    assert task.head(5) == {}  # nobody knows yet
    with pytest.raises(WireError):
        task.merge(b"", b"no record")
    with pytest.raises(DataError, match=r"no site has told its labels, and task\.classes lists none"):
        task.agreed(b"")


def test_where_labels_are_listed_nobody_tells_any() -> None:
    task = Classify(classes=("b", "a"))
    assert (task.propose(columns("a")), task.merge(b"", pack(Classes(("z",))))) == (b"", b"")
    assert task.agreed(b"").facts == {"classes": ["a", "b"]}
    with pytest.raises(DataError, match=r"found the label 'z', which task\.classes does not list; expected one of 'b'"):
        task.propose(columns("a", "z"))


@pytest.mark.parametrize("where", ["data", "task"])
def test_classes_may_be_listed_in_either_section(where: str) -> None:
    found: Any = resolve({where: {"classes": ["u", "v"]}}, Path())
    assert found.task == Classify(classes=("u", "v"))
    assert resolve(tomllib.loads(dump(found)), Path()).task == found.task


# --- another task --------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("regress", Regress), ("level", Level), ("words", Words)):
        monkeypatch.setitem(TASKS, name, kind)  # type: ignore[arg-type]  # a line of the table


def tree(task: str, **algorithm: Any) -> dict[str, Any]:
    return {**DIGITS, "task": {"name": task}, "algorithm": {"name": "fedit", **algorithm}}


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("name", ["fedit", "ce-lora"])
def test_a_task_of_somebody_elses_runs_from_configuration_to_export(tmp_path: Path, name: str) -> None:
    given = resolve(
        {"name": "numbers", **tree("regress", name=name), "task": {"name": "regress", "scale": 9}}, tmp_path
    )
    for _ in experiment.run(given, tmp_path / "run"):
        pass
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    alone = json.loads((tmp_path / "run" / "local" / "summary.json").read_text())
    assert summary["headline"] == {"metric": "loss", "higher_is_better": False}
    means = {name: of["mean"] for name, of in summary["test_metrics"].items()}
    assert means["loss"] == pytest.approx(summary["metrics"]["mean"])
    assert list(means) == ["loss", "absolute"]
    assert not any(of["higher_is_better"] for of in summary["test_metrics"].values())
    assert summary["settings"]["task"] == {"name": "regress", "scale": 9.0}
    rounds = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    means = [
        e["validation"]["personal"]["mean"] for e in rounds if e["event"] == "round" and e["validation"]["personal"]
    ]
    assert summary["moments"]["personal"]["validation"] == min(means)  # the lowest loss is the best
    for client, row in summary["clients"].items():
        assert row["lift"] == pytest.approx(alone["clients"][client]["score"] - row["score"])
        assert list(row["test_metrics"]) == ["loss", "absolute"]
        assert row["test_metrics"]["loss"] == row["score"]
        assert row["majority"] is not None
        adapter = tmp_path / "run" / "adapters" / client
        assert "LoRA adapter for numbers" in (adapter / "README.md").read_text()
        assert (adapter / "head.safetensors").exists()
    assert summary["metrics"]["worst_decile"] == max(row["score"] for row in summary["clients"].values())
    told = [text for text in summary["notices"] if "the task has no classes" in text]
    assert len(told) == (3 if name == "ce-lora" else 0)


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("partition", ["dirichlet", "classes"])
def test_without_strata_rows_cannot_be_dealt_by_label(partition: str, tmp_path: Path) -> None:
    given = resolve({**tree("regress"), "data": {**DIGITS["data"], "partition": partition}}, tmp_path)
    with pytest.raises(DataError, match=f"partition = '{partition}' deals rows by their label"):
        ResourceCache().federation(given)
    auto = resolve({**tree("regress"), "data": {**DIGITS["data"], "partition": "auto"}}, tmp_path)
    iid = resolve(tree("regress"), tmp_path)
    assert ResourceCache().federation(auto).clients == ResourceCache().federation(iid).clients


@pytest.mark.usefixtures("tasks")
def test_a_method_that_needs_what_the_task_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"task.name: level has no head, and fedmosaic needs it; expected 'classify',"
    ):
        resolve(tree("level", name="fedmosaic"), Path())
    with pytest.raises(ConfigError, match=r"level has no head, and with model.own the adapter stands beside it"):
        resolve({**tree("level", name="pfedlora"), "model": {"own": ["cnn-1"]}}, Path())
    info = ALGORITHMS["fedit"].info
    object.__setattr__(info, "needs", frozenset({"classes"}))
    try:
        with pytest.raises(
            ConfigError, match=r"task.name: words has no classes, and fedit needs it; expected 'classify'"
        ):
            resolve(tree("words"), Path())
    finally:
        object.__setattr__(info, "needs", frozenset())
    with pytest.raises(ConfigError, match=r"task.name: found 'clasify', expected .*Did you mean 'classify'"):
        resolve({"task": {"name": "clasify"}}, Path())


@pytest.fixture(scope="module")
def resources() -> ResourceCache:
    return ResourceCache()


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("name", [name for name, kind in ALGORITHMS.items() if not kind.info.needs])
def test_every_algorithm_that_needs_no_head_trains_without_one(name: str, resources: ResourceCache) -> None:
    given = resolve(tree("level", name=name), Path())
    population, stores = resources.population(given), dict[str, Any]()
    assert not any(name.startswith("head.") for name in population.initial)
    schema = Schema.of(population.initial)
    engine = Embedded(
        given.algorithm, population.learner, stores, schema, *given.engine.solver(population.models.device)
    )
    for done in run_rounds(
        given.algorithm, engine, given.plan, population.clients, population.initial, headline=given.task.headline
    ):
        assert not done.excluded
        assert done.index > given.plan.rounds or len(done.heard) == 3
        assert all(traffic.head_up == traffic.head_down == 0 for traffic in done.traffic.values())


@pytest.mark.usefixtures("tasks")
def test_a_job_without_labels_starts_on_sites(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([f"text {n}", str(n)] for n in range(40))])
    given = resolve(
        {"data": {}, "adapter": {"layers": "last:1"}, "task": {"name": "regress"}, "algorithm": {"name": "fedit"}},
        tmp_path,
    )
    resources, here = ResourceCache(), enter("mine", Join(SiteData(path), "127.0.0.1:1", tmp_path, None, None, "mine"))
    asked: list[JobStart] = []

    class Far:
        """A `Remote` whose only site is the one here."""

        facts: dict[str, ClientFacts] = {}  # noqa: RUF012
        refused: dict[str, str] = {}  # noqa: RUF012

        def start_job(self, job: str, start: JobStart, expected: Any, seconds: float) -> None:
            asked.append(start)
            self.facts["mine"] = here(start).facts

    pool = SiteRuntime(Far(), resources, ("mine",), 1.0).pool(given, RunFolder(tmp_path / "run"), "f/job", {})  # type: ignore[arg-type]
    assert [(start.agreement, start.clients) for start in asked] == [(b"", ()), (b"", ("mine",))]
    assert pool.info.baseline["mine"] is not None
    assert Schema.of(pool.info.initial) == Schema.of(here(asked[-1]).initial)


# --- what counts ---------------------------------------------------------------------------------------------------


@cache
def minilm() -> Backbone:
    return load(Model(device="cpu"), Adapter(layers="last:1"), Path())


def talkers() -> list[ModelLearner]:
    """Two clients with texts of unlike length, whose labels have 0 to 5 words."""
    texts = [
        "short",
        "a rather longer text of many words that go on and on",
        "of middling length, this",
        "yes",
        "no, not at all",
    ]
    labels = ["one", "one two three four five", "", "four four", "three two one"]
    network, task = AdaptedBackbone(minilm(), Lora()), Words()
    examples = task.read(Table(texts * 2, labels * 2, None, None, [""] * 10), network)
    forward = BatchedForward(network, task)
    weights = families.initial(minilm().targets, Adapter(rank=4), Lora(), task.head(network.width), seed=0)
    draw = torch.Generator().manual_seed(1)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
    return [
        ModelLearner(
            forward,
            {"train": Rows(examples, list(at))},
            weights,
            Recipe(batch_size=5, steps=2),
            seed=0,
            client=str(at),
            round=1,
        )
        for at in (range(5), range(4, 9))
    ]


def test_pieces_of_a_batch_are_weighted_by_target_tokens() -> None:
    learners = talkers()
    batches = [next(it.batches()) for it in learners]
    forward: Any = learners[0].shared
    pieces = forward.cut(batches[0])
    assert [len(piece["words"]) for piece in pieces] == [1] * 5
    counts = [forward.count(piece) for piece in pieces]
    assert sorted(counts) == [0, 1, 2, 3, 5] and forward.count(batches[0]) == 11
    asked = [(it, Gradient({}, batch, but())) for it, batch in zip(learners, batches, strict=True)]
    joined: list[int] = []

    def watched(batches: Any, join: Any = forward.join) -> Any:
        joined.append(len(batches))
        return join(batches)

    forward.join = watched
    together = Gradient.together(asked, forward)
    assert max(joined) > 2  # pieces of both clients in a pass
    for found, (it, problem) in zip(together, asked, strict=True):
        whole = problem.alone(it)
        assert not isinstance(found, Exception)
        assert found.loss == pytest.approx(whole.loss, abs=1e-5)
        close(found.gradient, whole.gradient)
    means = [it.losses(it.initial, piece).item() for it in learners[:1] for piece in pieces]
    of_batch = learners[0].losses(learners[0].initial, batches[0]).item()
    assert of_batch == pytest.approx(sum(n * mean for n, mean in zip(counts, means, strict=True)) / 11, abs=1e-5)
    assert abs(of_batch - sum(means) / 5) > 0.1  # a mean over rows would be something else


def test_a_fit_is_the_same_alone_and_together_where_tokens_count() -> None:
    problems = [(it, Fit({}, only("B", "head"))) for it in talkers()]
    together = Fit.together(problems, problems[0][0].shared)  # type: ignore[arg-type]
    for found, it in zip(together, talkers(), strict=True):
        alone = Fit({}, only("B", "head")).alone(it)
        assert not isinstance(found, Exception)
        assert found.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-5)
        close(found.weights, alone.weights)


def test_metrics_of_a_split_are_over_its_tokens_whatever_the_passes() -> None:
    it = talkers()[0]
    found = it.test({}, "train")
    assert found["score"] == found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    batch = it.shared.batch(it.rows("train"), range(5)) if it.shared else {}
    assert found["loss"] == pytest.approx(it.losses(it.initial, batch).item(), abs=1e-5)


def test_a_batch_in_which_nothing_counts_has_no_loss_but_its_penalty() -> None:
    it = talkers()[0]
    forward: Any = it.shared
    row = next(number for number in range(5) if forward.count(forward.batch(it.rows("train"), [number])) == 0)
    empty = forward.batch(it.rows("train"), [row, row])
    assert it.losses(it.initial, empty) == 0.0
    for found in Gradient.together([(it, Gradient({}, empty, but()))] * 2, forward):
        assert not isinstance(found, Exception)
        assert all(not g.any() for g in found.gradient.values())
