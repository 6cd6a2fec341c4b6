"""celora.core.solve: clients side by side learn what they learn alone, and fail alone."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from celora.core.adapters import Family, Lora, Tri
from celora.core.learner import Learner, Recipe
from celora.core.problems import ClientUpdate, Features, Fit, Score
from celora.core.solve import solve, solve_together
from celora.core.training import FILLING, PASS, Fitted, passes
from celora.models.backbone import Backbone, load
from celora.models.batching import BatchedForward
from celora.models.learner import ModelLearner
from celora.models.settings import Adapter, Model
from celora.tensors import Tensors, but, only
from tests.classifier import forward, initial, parts
from tests.classifier import rows as rows_of
from tests.toy import RECIPE, Population, image

EVERYTHING = but()
SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 200)), max_size=40)


@given(SIZES, st.integers(1, 2000))
def test_passes_cover_every_piece_once_within_capacity_and_with_little_filling(
    sizes: list[tuple[int, int]], capacity: int
) -> None:
    found = list(passes(sizes, capacity))
    assert Counter(at for group in found for at in group) == Counter(range(len(sizes)))
    for group in found:
        filled = len(group) * max(sizes[at][0] for at in group) * max(sizes[at][1] for at in group)
        content = sum(sizes[at][0] * sizes[at][1] for at in group)
        waste = max((FILLING - 1) * content, PASS * capacity)
        assert len(group) == 1 or (filled <= capacity and filled - content <= waste + 1e-9)


def test_batches_of_one_shape_share_passes_up_to_the_capacity() -> None:
    assert [len(group) for group in passes([(4, 32)] * 20, 1024)] == [8, 8, 4]
    assert [len(group) for group in passes([(4, 32)] * 3, 64)] == [1, 1, 1]  # larger than a pass: each alone


def test_rows_of_unlike_length_are_cut_and_go_with_their_like() -> None:
    """Two clients' batches of a short and a long text: padded 4 × 40 tokens, cut and joined 2 × 5 and 2 × 40."""
    backbone = load(Model(device="cpu"), Adapter(), Path())
    shared = forward(backbone, Lora())
    rows = rows_of([[101] * 5, [101] * 40, [101] * 41, [101] * 42], torch.arange(4))
    uneven, even = shared.batch(rows, [0, 1]), shared.batch(rows, [1, 2, 3])
    assert [shared.size(piece) for piece in shared.cut(uneven)] == [(1, 5), (1, 40)]
    assert [shared.size(piece) for piece in shared.cut(even)] == [(3, 42)]
    pieces = [*shared.cut(uneven), *shared.cut(uneven)]
    assert list(passes([shared.size(piece) for piece in pieces], 1024)) == [[0, 2], [1, 3]]
    assert shared.cut({"pixel_values": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(3)})[0]["labels"].shape == (3,)


# --- toy clients ---------------------------------------------------------------------------------------------------


def fits(population: Population, *penalties: Any, train: Any = EVERYTHING) -> Any:
    more = dict(enumerate(penalties))
    return [(population(client, 1), Fit({}, train, more.get(at))) for at, client in enumerate(("c0", "c1", "c2"))]


def close(one: Tensors, other: Tensors) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{}, {"epochs": 3}, {"steps": 5}, {"decay": "linear"}, {"clip": 0.05}])
@pytest.mark.parametrize("train", [but(), only("B"), only("C", "head")])
def test_unequal_numbers_of_steps_rows_and_recipes(change: dict[str, Any], train: Any) -> None:
    """24, 30 and 36 rows in batches of 7: 4, 5 and 6 steps, the last ones of 3, 2 and 1 rows."""
    population = Population(Tri(), recipe=replace(RECIPE, batch_size=7, **change))
    together = Fit.together(fits(population, train=train), population.shared)
    assert max(population.shared.clients) > 1
    for fitted, (learner, problem) in zip(together, fits(population, train=train), strict=True):
        alone = problem.alone(learner)
        close(fitted.weights, alone.weights)
        assert fitted.metrics == pytest.approx(alone.metrics, abs=1e-5)


def test_penalties_are_each_clients_own() -> None:
    def near_zero(weights: Tensors) -> torch.Tensor:
        return 5 * weights["layer.A"].square().sum()

    def near_one(weights: Tensors) -> torch.Tensor:
        assert weights["layer.A"].shape == (4, 6)
        return 5 * (weights["layer.A"] - 1).square().sum()

    population = Population(Lora())
    together = Fit.together(fits(population, near_zero, near_one), population.shared)
    ends = [problem.alone(learner) for learner, problem in fits(population, near_zero, near_one)]
    for fitted, alone in zip(together, ends, strict=True):
        close(fitted.weights, alone.weights)
    assert ends[0].weights["layer.A"].norm() < ends[2].weights["layer.A"].norm()


def test_frozen_parts_may_differ_from_client_to_client() -> None:
    population = Population(Lora())
    problems = [
        (population(client, 1), Fit({"layer.A": torch.full((4, 6), 0.1 * at)}, only("B", "head")))
        for at, client in enumerate(("c0", "c1", "c2"))
    ]
    for fitted, (learner, problem) in zip(Fit.together(problems, problems[0][0].shared), problems, strict=True):
        again = replace(problem)
        close(fitted.weights, again.alone(population(learner.client, 1)).weights)
        assert fitted.weights["layer.A"] is problem.weights["layer.A"]


def test_clients_that_train_other_names_or_by_another_recipe_are_not_stacked() -> None:
    """They are still solved, each with its like."""
    one, other = Population(Tri()), Population(Tri(), recipe=replace(RECIPE, lr=1e-3))
    other.shared = one.shared
    problems = [*fits(one, train=only("B")), *fits(one, train=only("C")), *fits(other, train=only("C"))]
    expected = [problem.alone(learner.population(learner.client, 1)) for learner, problem in problems]
    for fitted, alone in zip(Fit.together(problems, problems[0][0].shared), expected, strict=True):
        close(fitted.weights, alone.weights)


@pytest.mark.parametrize("fault", ["raises", "diverges"])
def test_one_clients_fault_is_its_own(fault: str) -> None:
    torn = ZeroDivisionError("no rows")
    population = Population(Tri(), faults={("c1", 1): torn} if fault == "raises" else {})
    problems = fits(population)
    if fault == "diverges":
        problems[1] = (problems[1][0], Fit({"layer.A": torch.full((4, 6), torch.nan)}, EVERYTHING))
    together, healthy = Fit.together(problems, problems[0][0].shared), Population(Tri())
    for at, client in ((0, "c0"), (2, "c2")):
        close(together[at].weights, Fit({}, EVERYTHING).alone(healthy(client, 1)).weights)
    if fault == "raises":
        assert together[1] is torn
    else:
        assert together[1].weights["layer.B"].isnan().all()
        assert math.isnan(together[1].metrics["loss"])


def test_nothing_to_train_is_that_clients_error() -> None:
    population = Population(Lora())
    problems = [(population("c0", 1), Fit({}, only("C"))), (population("c1", 1), Fit({}, only("B")))]
    refused, fitted = Fit.together(problems, problems[0][0].shared)
    assert "nothing to train" in str(refused)
    close(fitted.weights, Fit({}, only("B")).alone(population("c1", 1)).weights)


def everything(learner: Learner, log: list[str]) -> ClientUpdate[Any]:
    """A turn of two fits, a score and features."""
    first = yield from Fit({}, only("B"))
    log.append("fit")
    metrics = yield from Score(first.weights, "validation")
    features, labels = yield from Features()
    second = yield from Fit(first.weights, but())
    return second.weights, metrics, features, labels


def test_turns_that_ask_for_several_things_go_side_by_side() -> None:
    population, log = Population(Tri()), list[str]()
    learners = [population(client, 1) for client in ("c0", "c1", "c2")]
    together = solve_together([(it, everything(it, log)) for it in learners])
    assert log == ["fit"] * 3
    alone = solve([(it, everything(it, log)) for it in (population(client, 1) for client in ("c0", "c1", "c2"))])
    for one, other in zip(together, alone, strict=True):
        close(one[0], other[0])
        assert one[1] == pytest.approx(other[1], abs=1e-5)
        assert image(one[2:]) == image(other[2:])


def test_a_turn_may_handle_its_failed_problem_and_one_that_does_not_fails_alone() -> None:
    population = Population(Tri(), faults={("c0", 1): ValueError("torn"), ("c1", 1): ValueError("torn")})

    def careful(learner: Learner) -> ClientUpdate[str]:
        try:
            yield from Fit({}, but())
        except ValueError as error:
            return f"handled {error}"
        return "fitted"

    def careless(learner: Learner) -> ClientUpdate[str]:
        yield from Fit({}, but())
        return "fitted"

    learners = [population(client, 1) for client in ("c0", "c1", "c2")]
    turns = [careful(learners[0]), careless(learners[1]), careless(learners[2])]
    handled, failed, fitted = solve_together(list(zip(learners, turns, strict=True)))
    assert (handled, fitted) == ("handled torn", "fitted")
    assert isinstance(failed, ValueError)


# --- real backbones ------------------------------------------------------------------------------------------------


def vit(**more: Any) -> tuple[Backbone, Adapter]:
    adapter = Adapter(targets=("q_proj", "v_proj"), rank=3)
    return load(Model(backbone="random-vit", device="cpu", **more), adapter, Path()), adapter


def clients(backbone: Backbone, adapter: Adapter, family: Family = Tri()) -> list[ModelLearner]:
    """Five of 5, 8, 11, 14 and 17 rows, in batches of 4."""
    found, shared, draw = list[ModelLearner](), forward(backbone, family), torch.Generator().manual_seed(0)
    weights = initial(backbone, adapter, family, 2, seed=0)
    sizes = [5 + 3 * client for client in range(5)]
    labels = torch.cat([torch.arange(size) % 2 for size in sizes])
    inputs: Any = torch.rand(len(labels), 1, 8, 8, generator=draw)
    if backbone.kind == "text":
        tokens = torch.randint(3, 30, labels.shape, generator=draw).tolist()
        inputs = [torch.randint(1000, 9000, (size,), generator=draw).tolist() for size in tokens]
    for client, rows in enumerate(parts(rows_of(inputs, labels), sizes)):
        splits: Any = {"train": rows, "validation": rows}
        recipe = Recipe(batch_size=4, lr=2e-3)
        found.append(ModelLearner(shared, splits, weights, recipe, seed=0, client=str(client), round=1))
    return found


@pytest.mark.parametrize("family", [Lora(), Tri()], ids=["lora", "tri"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_learners_of_one_backbone(kind: str, family: Any) -> None:
    backbone, adapter = vit() if kind == "image" else (load(Model(device="cpu"), Adapter(), Path()), Adapter())
    joined: list[int] = []

    def watched(batches: Any, join: Any = BatchedForward.join) -> Any:
        joined.append(len(batches))
        return join(shared, batches)

    learners = clients(backbone, adapter, family)
    shared: Any = learners[0].shared
    shared.join = watched
    together = solve_together([(it, everything(it, [])) for it in learners])
    alone = solve([(it, everything(it, [])) for it in clients(backbone, adapter, family)])
    assert max(joined) > 1
    for one, other in zip(together, alone, strict=True):
        far = torch.cat([(w - other[0][name]).abs().flatten() for name, w in one[0].items()])
        assert (far > 1e-5).float().mean() < 1e-3  # AdamW divides a tiny gradient, and its rounding, by its own size
        assert far.max() < 5e-4  # a quarter of one step
        assert one[1] == pytest.approx(other[1], abs=1e-5)
        torch.testing.assert_close(one[2], other[2], atol=1e-5, rtol=0)
        assert torch.equal(one[3], other[3])


def test_dropout_masks_are_drawn_for_one_client_so_it_runs_alone() -> None:
    learners = clients(*vit(dropout=True))
    assert learners[0].shared is None

    def fitted(learner: Learner) -> ClientUpdate[Fitted]:
        return (yield from Fit({}, but()))

    together = solve_together([(it, fitted(it)) for it in learners])
    alone = [Fit({}, but()).alone(it) for it in clients(*vit(dropout=True))]
    assert [image(one.weights) for one in together] == [image(one.weights) for one in alone]  # type: ignore[union-attr]
