"""Fed-HeLLo: the published allocations, what travels, and bugs of the code that are not here (methods.md 5; V, 9)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.fed_hello import FedHeLLo, Server, Up, chances, layers, pattern, ranked
from celora.core.aggregation import Heard
from celora.core.learner import Recipe
from celora.core.optim import AdamW
from celora.core.problems import ClientUpdate, Fit
from celora.core.solve import solve
from tests.facts.payloads import HEAD, rounds, weights
from tests.toy import Population, Stub, Toy, image, turn

TIERS = (6, 9, 12)
LAYER = 2 * 8 * (384 + 384) * 4
"""Bytes of a layer of MiniLM: query and value at r = 8."""
GD = {
    "triangle": [set(range(6)), set(range(9))],
    "inverted": [set(range(6, 12)), set(range(3, 12))],
    "bottleneck": [{0, 1, 2, 9, 10, 11}, {0, 1, 2, 3, 4, 8, 9, 10, 11}],
    "uniform": [{0, 2, 4, 6, 8, 10}, {0, 1, 2, 4, 5, 6, 8, 9, 10}],
}
RGD = {
    "triangle": [3] * 6 + [2] * 3 + [1] * 3,
    "inverted": [1] * 3 + [2] * 3 + [3] * 6,
    "bottleneck": [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3],
    "uniform": [27 / 12] * 12,
}


def twelve() -> dict[str, Tensor]:
    names = [f"encoder.layer.{n}.attention.self.{m}.{p}" for n in range(12) for m in ("query", "value") for p in "AB"]
    return {**{name: torch.ones(1, 1) for name in names}, "head.weight": torch.ones(1, 1)}


@pytest.mark.parametrize("shape", GD)
def test_the_patterns_for_12_layers_are_the_published_ones(shape: Any) -> None:
    assert [set(pattern(shape, 12, count)) for count in TIERS] == [*GD[shape], set(range(12))]


@pytest.mark.parametrize("shape", RGD)
def test_the_chances_for_12_layers_are_the_published_ones(shape: Any) -> None:
    assert chances(shape, 12, TIERS).tolist() == pytest.approx([weight / 27 for weight in RGD[shape]], abs=1e-15)


@pytest.mark.parametrize("shape", GD)
@pytest.mark.parametrize("depth", range(1, 40))
def test_patterns_of_any_depth_have_as_many_layers_as_asked_for_and_chances_sum_to_1(shape: Any, depth: int) -> None:
    for count in range(1, depth + 1):
        found = pattern(shape, depth, count)
        assert found == sorted(set(found))
        assert len(found) == count
        assert set(found) <= set(range(depth))
        p = chances(shape, depth, [count, depth // 2 + 1])
        assert float(p.sum()) == pytest.approx(1)
        assert int((p > 0).sum()) >= count  # else `count` layers could not be drawn


def test_the_straggler_baseline_trains_the_same_six_layers_everywhere() -> None:
    algorithm = FedHeLLo(allocation="uniform", tiers=(0.5,))
    server = algorithm.server_init(twelve(), "abc")
    assert {algorithm.send(server, client).layers for client in "abc"} == {(0, 2, 4, 6, 8, 10)}


def test_thirds_of_the_clients_train_6_9_and_12_layers() -> None:
    server = FedHeLLo().server_init(twelve(), "fedcba")
    assert server.counts == dict(zip("abcdef", (6, 6, 9, 9, 12, 12), strict=True))


def test_layers_are_drawn_without_replacement_by_their_chances() -> None:
    algorithm = FedHeLLo(allocation="bottleneck", randomised=True, tiers=(1 / 12, 0.5))
    server = Server({}, {"one": 1, "six": 6}, 0, chances("bottleneck", 12, TIERS))
    once = torch.zeros(12)
    for now in range(4000):
        at = Server({}, server.counts, now, server.chances)
        once[list(algorithm.send(at, "one").layers)] += 1
        assert len(set(algorithm.send(at, "six").layers)) == 6
    assert float((once / 4000 - server.chances).abs().max()) < 0.02


def test_a_draw_depends_on_seed_round_and_client_and_on_nothing_else() -> None:
    def drawn(now: int, client: str, seed: int = 0) -> tuple[int, ...]:
        server = Server({}, {"a": 6, "b": 6}, now, chances("uniform", 12, TIERS))
        return FedHeLLo(seed=seed).send(server, client).layers

    assert drawn(3, "a") == drawn(3, "a")
    assert len({drawn(3, "a"), drawn(4, "a"), drawn(3, "b"), drawn(3, "a", seed=1)}) == 4


# --- what travels -------------------------------------------------------------------------------------------------


def test_a_client_sends_its_layers_and_receives_all() -> None:
    """6 layers of MiniLM, tiers of 3 and 6: 3 and 6 times 49,152 bytes up, with 6 scores of 4 bytes in round 1."""
    first, second, closing = (rnd.traffic for rnd in rounds(FedHeLLo(tiers=(0.5, 1.0))))
    assert LAYER == 49_152
    assert [first[c].up_payload for c in "ab"] == [3 * LAYER + 6 * 4, 6 * LAYER + 6 * 4]
    assert [second[c].up_payload for c in "ab"] == [3 * LAYER, 6 * LAYER]
    assert [second[c].down_payload for c in "ab"] == [closing[c].down_payload for c in "ab"] == [6 * LAYER] * 2
    assert [second[c].head_up for c in "ab"] == [HEAD, HEAD]


def test_on_average_three_quarters_of_fedits_numbers_go_up() -> None:
    traffic = rounds(FedHeLLo(allocation="triangle"), "abcdef")[1].traffic
    wanted = FedHeLLo.info.floats(8, 384, 384) * 12 * 4
    # 5 layers of 6 cannot be 4.5: round(0.75 · 6) = 4
    assert sum(traffic[c].up_payload for c in "abcdef") / 6 == pytest.approx(wanted, rel=0.04)


# --- bugs of the published code that are not here ------------------------------------------------------------------


def test_a_the_most_important_layers_are_drawn_most() -> None:
    """Clusters are ordered by their centres, not by the labels that k-means happens to give."""
    scores = torch.tensor([9.0, 8.8, 8.9, 9.1, 5.0, 5.2, 4.9, 0.3, 0.1, 0.2, 0.0, 0.4])
    expected = torch.tensor([3.0] * 4 + [2.0] * 3 + [1.0] * 5, dtype=torch.float64) / 23
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(ranked(scores[order]), expected[order])


@pytest.mark.parametrize(
    ("scores", "p"),
    [
        ([1.0], [1]),
        ([2.0, 2.0], [0.5, 0.5]),
        ([0.0, 7.0, 7.0], [2 / 8, 3 / 8, 3 / 8]),
        ([3.0, 1.0, 2.0], [3 / 6, 1 / 6, 2 / 6]),
    ],
)
def test_with_few_values_there_are_few_clusters(scores: list[float], p: list[float]) -> None:
    assert ranked(torch.tensor(scores)).tolist() == pytest.approx(p)


def test_b_layer_1_frozen_does_not_freeze_10_and_11() -> None:
    initial = twelve()
    place = layers(initial)
    assert [place[f"encoder.layer.{n}.attention.self.query.A"] for n in range(12)] == list(range(12))
    algorithm = FedHeLLo(allocation="inverted", tiers=(10 / 12,))
    down = algorithm.send(algorithm.server_init(initial, "a"), "a")
    assert down.layers == tuple(range(2, 12))
    problem, _ = turn(algorithm, Stub(initial), algorithm.client_init(Stub(initial)), down, {})
    asked = {name.split(".")[2] for name in initial if name != "head.weight" and problem.train(name)}
    assert asked == {str(n) for n in range(2, 12)}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["layer"], [0]),
        (["h.11.attn", "h.2.attn", "h.2.mlp.4.fc"], [1, 0, 0]),  # by number, whatever the order of names
        (["model.0.layer.5.q", "model.0.layer.7.q"], [0, 1]),  # the first number is always the same
        (["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.1.q"], [0, 1, 2, 3]),
        (["encoder.layer.5.query", "encoder.layer.5.value"], [0, 0]),
    ],
)
def test_layers_are_found_in_names(paths: list[str], expected: list[int]) -> None:
    found = layers({f"{path}.A": torch.zeros(1) for path in paths} | {"head.weight": torch.zeros(1)})
    assert list(found.values()) == expected


def test_c_the_head_is_averaged() -> None:
    algorithm = FedHeLLo()
    server = algorithm.server_init(twelve(), "ab")
    ups = {c: Up({"head.weight": torch.full((1, 1), value)}, None) for c, value in (("a", 1.0), ("b", 3.0))}
    assert algorithm.aggregate(server, Heard(ups)).weights["head.weight"].tolist() == [[2.0]]


def test_e_frozen_layers_have_no_gradient_and_no_memory_in_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's A (4, 6) and B (8, 4) are 56 numbers, and the head 18: of two layers, one is in the optimiser."""
    held = list[int]()

    class Counting(AdamW):
        def __init__(self, like: Tensor, recipe: Recipe) -> None:
            held.append(like.shape[1])
            super().__init__(like, recipe)

    monkeypatch.setattr("celora.core.training.AdamW", Counting)
    algorithm = FedHeLLo(allocation="inverted", tiers=(0.5,))
    population = Population(algorithm.family)
    twice = {f"block.{n}.{p}": population.initial[f"layer.{p}"].clone() for n in (0, 1) for p in "AB"}
    population.initial = {**twice, **{n: w for n, w in population.initial.items() if n.startswith("head")}}
    learner = TwoBlocks(population, "c0", 1)
    server = algorithm.server_init(learner.initial, ["c0"])
    steps = algorithm.train(learner, algorithm.client_init(learner), algorithm.send(server, "c0"))
    problem = next(steps)
    assert isinstance(problem, Fit)
    fitted = problem.alone(learner)
    assert held == [56 + 18]
    for name in ("block.0.A", "block.0.B"):
        assert image(fitted.weights[name]) == image(learner.initial[name])
    assert image(fitted.weights["block.1.B"]) != image(learner.initial["block.1.B"])
    with pytest.raises(StopIteration) as end:
        steps.send(fitted)
    assert sorted(end.value.value.up.weights) == ["block.1.A", "block.1.B", "head.bias", "head.weight"]


class TwoBlocks(Toy):
    """A toy whose one layer is adapted twice, as block 0 and block 1."""

    def logits(self, weights: Any, x: Tensor) -> Tensor:
        both = {
            "layer.A": torch.cat([weights["block.0.A"], weights["block.1.A"]], dim=-2),
            "layer.B": torch.cat([weights["block.0.B"], weights["block.1.B"]], dim=-1),
        }
        return super().logits({**both, "head.weight": weights["head.weight"], "head.bias": weights["head.bias"]}, x)


def test_g_measured_importance_holds_until_it_is_measured_again() -> None:
    algorithm = FedHeLLo(first=2, every=3)
    initial = twelve()
    server = algorithm.server_init(initial, "ab")
    bottleneck = chances("bottleneck", 12, TIERS)
    asked, p = [], []
    for now in range(1, 9):
        downs = {client: algorithm.send(server, client) for client in "ab"}
        asked.append(downs["a"].measure)
        scores = torch.arange(12.0).roll(now) if downs["a"].measure else None
        ups = {c: Up({"head.weight": torch.ones(1, 1)}, scores) for c in "ab"}
        server = algorithm.aggregate(server, Heard(ups))
        p.append(server.chances)
    assert asked == [False, True, False, False, True, False, False, True]
    changed = [not torch.equal(before, after) for before, after in pairwise([bottleneck, *p])]
    assert changed == asked


def test_the_mean_over_clients_of_what_they_measured_decides() -> None:
    algorithm = FedHeLLo()
    server = algorithm.server_init(twelve(), "ab")
    high, low = torch.zeros(12), torch.zeros(12)
    high[3], low[3], low[4] = 8.0, 0.0, 3.0
    ups = {c: Up({"head.weight": torch.ones(1, 1)}, f) for c, f in (("a", high), ("b", low))}
    p = algorithm.aggregate(server, Heard(ups)).chances
    assert torch.equal(p, ranked((high + low) / 2))
    assert int(p.argmax()) == 3


def test_a_measurement_of_another_model_is_passed_over() -> None:
    algorithm = FedHeLLo()
    server = algorithm.server_init(twelve(), "ab")
    ups = {"a": Up({"head.weight": torch.ones(1, 1)}, torch.ones(5))}
    assert torch.equal(algorithm.aggregate(server, Heard(ups)).chances, server.chances)


def test_importance_is_that_of_single_rows() -> None:
    """The square of a batch's mean gradient would be another number: 0 where rows cancel."""
    algorithm = FedHeLLo(fim_rows=5)
    learner = Population(algorithm.family)("c0", 1)
    rows = [batch for batch, _ in zip(Population(algorithm.family)("c0", 1).batches(1), range(5), strict=False)]
    expected = {name: torch.zeros_like(learner.initial[name]) for name in ("layer.A", "layer.B")}
    for row in rows:
        assert len(row["y"]) == 1
        weights = {name: w.clone().requires_grad_(True) for name, w in learner.initial.items()}
        found = torch.autograd.grad(learner.losses(weights, row), [weights[name] for name in expected])
        expected = {n: e + g**2 / 5 for (n, e), g in zip(expected.items(), found, strict=True)}

    def measuring() -> ClientUpdate[Tensor]:
        return (yield from algorithm.importance(learner, {}))

    (measured,) = solve([(learner, measuring())])
    assert measured.tolist() == pytest.approx([float(sum(e.norm() for e in expected.values()))])


def test_minilm_has_six_layers() -> None:
    assert sorted(set(layers(weights(FedHeLLo().family)).values())) == list(range(6))
