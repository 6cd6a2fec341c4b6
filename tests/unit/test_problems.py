"""What a turn may ask for besides a plain `Fit`: Gradient, Fit.objective, Score.rows, Channels. Alone as together."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.core.adapters import Dual, Family, Lora
from celora.core.client import _metered
from celora.core.learner import Batch, Learner, Losses
from celora.core.problems import ClientUpdate, Fit, Gradient, InputNorms, Score
from celora.core.solve import solve, solve_together
from celora.models.backbone import load
from celora.models.settings import Adapter, Model
from celora.tensors import Tensors, but, only, select
from tests.toy import RECIPE, Population, image
from tests.unit.test_solve import clients, close, vit

CLIENTS = ("c0", "c1", "c2")
X, Y = ("layer.A", "layer.B"), ("layer.A2", "layer.B2")


def some(like: Tensors, seed: int, scale: float = 0.3) -> dict[str, Tensor]:
    """Weights that are 0 nowhere."""
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(w.shape, generator=draw) for name, w in like.items()}


def wide(tensors: Tensors) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def first(learner: Any) -> Batch:
    return next(iter(learner.batches()))


def asked(population: Population, names: Any, along: Any = None) -> list[tuple[Any, Gradient]]:
    """Of each client at weights of its own, on its first batch; `along` is the client's own, too."""
    problems = []
    for at, client in enumerate(CLIENTS):
        learner = population(client, 1)
        weights = some(learner.initial, at)
        vector = None if along is None else select(some(learner.initial, 10 + at), along)
        problems.append((learner, Gradient(weights, first(learner), names, vector)))
    return problems


# --- Gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [but(), only("B"), only("A", "head")])
def test_a_gradient_is_autograds_unclipped(names: Any) -> None:
    population = Population(Lora(), recipe=replace(RECIPE, clip=1e-6, weight_decay=0.5))
    for learner, problem in asked(population, names):
        weights = {name: w.clone().requires_grad_() for name, w in problem.weights.items()}
        loss = learner.losses(weights, problem.batch)
        loss.backward()
        found = problem.alone(learner)
        assert found.loss == pytest.approx(loss.item(), rel=1e-6)
        assert list(found.gradient) == [name for name in weights if names(name)]
        for name, gradient in found.gradient.items():
            torch.testing.assert_close(gradient, weights[name].grad)
            assert gradient.untyped_storage().nbytes() == gradient.nbytes
            assert not gradient.requires_grad


@pytest.mark.parametrize("along", [None, only("A2", "B2"), only("A", "A2"), but()], ids=["none", "y", "mixed", "all"])
@pytest.mark.parametrize("names", [only("A", "B"), but()], ids=["x", "all"])
def test_gradients_together_are_those_alone(names: Any, along: Any) -> None:
    """16 rows are cut in two pieces of eight, which add up; each client has weights and a direction of its own."""
    population = Population(Dual())
    problems = asked(population, names, along)
    for found, (learner, problem) in zip(Gradient.together(problems, problems[0][0].shared), problems, strict=True):
        alone = problem.alone(learner)
        assert found.loss == pytest.approx(alone.loss, abs=1e-6)  # type: ignore[union-attr]
        close(found.gradient, alone.gradient)  # type: ignore[union-attr]
    assert max(population.shared.clients) == 6  # both pieces of all three in one pass


def test_pieces_of_a_batch_add_up_by_their_rows() -> None:
    """7 + 8 rows of one batch: its mean is 7/15 and 8/15 of theirs."""
    population = Population(Dual())
    learner = population("c1", 1)
    batch = {name: t[:15] for name, t in first(learner).items()}
    parts = [{name: t[rows] for name, t in batch.items()} for rows in (slice(0, 7), slice(7, 15))]
    weights = some(learner.initial, 0)
    for along in (None, select(some(learner.initial, 1), only("B2"))):
        (whole,) = Gradient.together([(learner, Gradient(weights, batch, but(), along))], population.shared)
        pieces = [Gradient(weights, part, but(), along).alone(learner) for part in parts]
        for name, gradient in whole.gradient.items():  # type: ignore[union-attr]
            expected = 7 / 15 * pieces[0].gradient[name] + 8 / 15 * pieces[1].gradient[name]
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("joint", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("along", [Y, X, ("layer.A", "head.weight")], ids=["mixed", "own", "both"])
def test_a_second_derivative_along_a_vector_is_a_difference_of_gradients(along: Any, joint: bool) -> None:
    """d/dt ∇_x F(w + t v) at t = 0, in float64, by central differences at 1e-5."""
    population = Population(Dual())
    learners = [population(client, 1) for client in CLIENTS]
    weights = [wide(some(learner.initial, at)) for at, learner in enumerate(learners)]
    vectors = [
        {name: wide(some(learner.initial, 9 + at))[name] for name in along} for at, learner in enumerate(learners)
    ]
    batches = [wide(first(learner)) for learner in learners]
    names = only("A", "B")
    problems = [
        (learner, Gradient(w, batch, names, v))
        for learner, w, batch, v in zip(learners, weights, batches, vectors, strict=True)
    ]
    answers: Any = (
        Gradient.together(problems, problems[0][0].shared)
        if joint
        else [problem.alone(learner) for learner, problem in problems]
    )
    for found, learner, w, v, batch in zip(answers, learners, weights, vectors, batches, strict=True):
        there, back = (
            Gradient({n: t + h * v[n] if n in v else t for n, t in w.items()}, batch, names).alone(learner).gradient
            for h in (1e-5, -1e-5)
        )
        for name in X:
            torch.testing.assert_close(found.gradient[name], (there[name] - back[name]) / 2e-5, atol=1e-8, rtol=1e-6)


def test_nothing_to_differentiate_is_that_clients_error() -> None:
    population = Population(Lora())
    problems = asked(population, only("B"))
    problems[1] = (problems[1][0], replace(problems[1][1], names=only("C")))
    found = Gradient.together(problems, problems[0][0].shared)
    assert "nothing to train" in str(found[1])
    close(found[2].gradient, problems[2][1].alone(problems[2][0]).gradient)  # type: ignore[union-attr]


def test_one_clients_failed_gradient_is_its_own() -> None:
    torn = ZeroDivisionError("no rows")
    population = Population(Lora(), faults={("c0", 1): torn})
    problems = asked(population, but())
    found = Gradient.together(problems, problems[0][0].shared)
    assert found[0] is torn
    for at in (1, 2):
        close(found[at].gradient, problems[at][1].alone(problems[at][0]).gradient)  # type: ignore[union-attr]


# --- Fit.objective -------------------------------------------------------------------------------------------------


class TwoParts:
    """Half the loss, and half that without the adapter: as for models in two parts."""

    def objective(self, losses: Losses, weights: Tensors) -> Tensor:
        return 0.5 * losses(weights) + 0.5 * losses({**weights, "layer.B": weights["layer.B"] * 0})


def test_an_objective_is_what_is_minimised() -> None:
    """One step of clipped-off AdamW at a gradient of half of one and half of the other."""
    population = Population(Lora(), recipe=replace(RECIPE, steps=3, clip=0.0))
    learner = population("c0", 1)
    start = some(learner.initial, 0)
    fitted = Fit(start, but(), objective=TwoParts().objective).alone(learner)
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=learner.recipe.lr, weight_decay=0.0)
    losses = []
    for batch in population("c0", 1).batches():
        optimizer.zero_grad()
        loss = TwoParts().objective(lambda w, batch=batch: learner.losses(w, batch), weights)  # type: ignore[misc]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    close(fitted.weights, {name: w.detach() for name, w in weights.items()})
    assert fitted.metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_objectives_together_are_those_alone_and_others_are_not_stacked_with_them() -> None:
    def turn(learner: Learner, method: Any) -> ClientUpdate[Any]:
        return (yield from Fit(some(learner.initial, 0), but(), objective=method))

    two, population = TwoParts(), Population(Lora())
    methods = [two.objective, two.objective, None]

    def jobs() -> Any:
        learners = [population(client, 1) for client in CLIENTS]
        return [(it, turn(it, method)) for it, method in zip(learners, methods, strict=True)]

    together, alone = solve_together(jobs()), solve(jobs())
    for one, other in zip(together, alone, strict=True):
        close(one.weights, other.weights)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-5)
    assert set(population.shared.clients) == {2, 3, 4}  # pieces of c0 and c1; the odd one out shares with itself


# --- Score.rows, Channels ------------------------------------------------------------------------------------------


def scored(learner: Learner) -> ClientUpdate[Any]:
    few = yield from Score(learner.initial, "validation", rows=5)
    none = yield from Score(learner.initial, "validation", rows=0)
    whole = yield from Score(learner.initial, "validation")
    most = yield from Score(learner.initial, "validation", rows=1000)
    input_norms = yield from InputNorms(3)
    return few, none, whole, most, input_norms


@pytest.mark.parametrize("solver", [solve, solve_together])
def test_scores_of_the_first_rows_and_channels(solver: Any) -> None:
    learners = clients(*vit())
    for at, (few, none, whole, most, input_norms) in enumerate(solver([(it, scored(it)) for it in learners])):
        assert (few["rows"], none, whole["rows"]) == (5, {"rows": 0.0}, 5 + 3 * at)
        assert most == whole
        again = clients(*vit())[at]
        assert few == pytest.approx(again.test(again.initial, "validation", 5), abs=1e-6)
        assert image(input_norms) == image(again.input_norms(3))
    assert few["loss"] != whole["loss"]


# --- the training loss of a turn that fits nothing ----------------------------------------------------------------


def test_a_turn_of_gradients_alone_tells_their_mean_loss() -> None:
    population = Population(Lora())

    def slopes(learner: Any) -> ClientUpdate[Any]:
        batches = list(learner.batches())
        for batch in batches:
            yield from Gradient({}, batch, but())
        yield from Gradient({"layer.B": torch.ones(8, 4)}, batches[0], only("A"), {"layer.B": torch.ones(8, 4)})
        return None

    learner = population("c1", 1)
    (ended,) = solve([(learner, _metered(slopes(learner)))])
    losses = [float(learner.losses(learner.initial, batch)) for batch in population("c1", 1).batches()]
    assert ended[1] == pytest.approx({"loss": sum(losses) / len(losses), "steps": len(losses)})


def test_where_there_was_a_fit_it_is_the_fits() -> None:
    population = Population(Lora())

    def both(learner: Any) -> ClientUpdate[Any]:
        yield from Fit({}, but())
        yield from Gradient({}, first(learner), but())
        return None

    learner = population("c1", 1)
    (ended,) = solve([(learner, _metered(both(learner)))])
    assert ended[1] == Fit({}, but()).alone(population("c1", 1)).metrics


def test_a_turn_that_trains_nothing_tells_nothing() -> None:
    def nothing(learner: Any) -> ClientUpdate[Any]:
        yield from Score(learner.initial, "validation")
        return None

    learner = Population(Lora())("c0", 1)
    assert solve([(learner, _metered(nothing(learner)))])[0][1] == {}


# --- real backbones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("along", [None, only("A2", "B2")], ids=["gradient", "second derivative"])
def test_gradients_on_minilm(along: Any) -> None:
    family: Family = Dual(divisor=2)
    adapter = Adapter()
    learners = clients(load(Model(device="cpu"), adapter, Path()), adapter, family)[:3]
    problems: list[tuple[Learner, Gradient]] = []
    for at, learner in enumerate(learners):
        weights = {
            n: w + 0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(at))
            for n, w in learner.initial.items()
        }
        vector = None if along is None else select(some(learner.initial, 10 + at), along)
        problems.append((learner, Gradient(weights, first(learner), only("A", "B"), vector)))
    for found, (learner, problem) in zip(Gradient.together(problems, problems[0][0].shared), problems, strict=True):
        alone = problem.alone(learner)
        assert found.loss == pytest.approx(alone.loss, abs=1e-5)  # type: ignore[union-attr]
        size = math.sqrt(sum(float(g.square().sum()) for g in alone.gradient.values()))
        gap = math.sqrt(
            sum(float((g - alone.gradient[n]).square().sum()) for n, g in found.gradient.items())  # type: ignore[union-attr]
        )
        assert size > 1e-3
        assert gap < 1e-4 * size
