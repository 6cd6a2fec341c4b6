"""Per-FedAvg, one round, two clients, by hand.

α = 1/4, β = 1/2, δ = 1/4, no clipping; the seed's A is 8, and everything is a number.
Client a, n = 1, mini-batches 1 and 2:

    w = 8     ∇f(8; 1) = 4      w' = 8 − 4/4 = 7
              ∇f(7; 2) = 2      v = 2
    FO                          w <- 8 − 2/2 = 7
    HF        ∇f(8.5; 1) = 7,   ∇f(7.5; 1) = 3     h = (7 − 3) / (2/4) = 8,   v − αh = 2 − 8/4 = 0,   w <- 8
    predicts  ∇f(8; 1) = 4      8 − 4/4 = 7

Client b, n = 3, one mini-batch, its own partner; FO: w' = 8 − 8/4 = 6, v = -4, w <- 10; predicts with 8 − 8/4 = 6.

server     FO: w <- (7 + 3·10) / 4 = 9.25
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from celora.algorithms.per_fedavg import PerFedAvg
from celora.core.aggregation import Heard
from celora.core.problems import Gradient
from celora.core.training import GradientResult
from tests.toy import RECIPE, Stub, image, played

RATES: dict[str, Any] = {"alpha": 0.25, "beta": 0.5, "delta": 0.25}
FREE = replace(RECIPE, clip=0.0)


def number(value: float, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((1, 1), float(value)) for name in names}


SEED = {**number(8, "layer.A", "layer.B"), **number(3, "head.weight")}
BATCHES = tuple({"x": torch.full((1,), float(i))} for i in range(1, 6))


def turned(algorithm: PerFedAvg, slopes: list[float], mini: Any, examples: int = 1) -> tuple[list[Any], Any]:
    learner = Stub(SEED, examples, recipe=FREE, mini=mini)
    names = ("layer.A", "layer.B") if algorithm.head == "frozen" else tuple(SEED)
    down = algorithm.send(algorithm.server_init(SEED, ()), "a")
    answers = [GradientResult(1.0, number(g, *names)) for g in slopes]
    return played(algorithm, learner, algorithm.client_init(learner), down, answers)


def asked(problems: list[Any]) -> list[tuple[float, float]]:
    """(A, mini-batch) of each gradient."""
    assert all(isinstance(problem, Gradient) for problem in problems)
    return [(float(problem.weights["layer.A"]), float(problem.batch["x"])) for problem in problems]


def one_round(head: str) -> tuple[PerFedAvg, Any, Any, Any]:
    algorithm = PerFedAvg(head=head, **RATES)
    a, b = turned(algorithm, [4, 2, 4], BATCHES[:2])[1], turned(algorithm, [8, -4, 8], BATCHES[:1], 3)[1]
    return algorithm, algorithm.aggregate(algorithm.server_init(SEED, ()), Heard({"a": a.up, "b": b.up})), a, b


def test_first_order() -> None:
    algorithm, server, a, b = one_round("shared")
    assert [float(end.up.weights["layer.A"]) for end in (a, b)] == [7.0, 10.0]
    assert [float(end.model["layer.A"]) for end in (a, b)] == [7.0, 6.0]
    assert float(a.model["head.weight"]) == 3 - 1
    assert float(server.weights["layer.A"]) == 9.25
    assert a.local.mine == {}
    assert float(algorithm.model(a.local, algorithm.send(server, "a"))["layer.A"]) == 9.25
    problems, _ = turned(algorithm, [4, 2, 4], BATCHES[:2])
    assert asked(problems) == [(8.0, 1.0), (7.0, 2.0), (8.0, 1.0)]


def test_hessian_free() -> None:
    problems, trained = turned(PerFedAvg(variant="HF", **RATES), [4, 2, 7, 3, 4], BATCHES[:2])
    assert asked(problems) == [(8.0, 1.0), (7.0, 2.0), (8.5, 1.0), (7.5, 1.0), (8.0, 1.0)]
    assert float(trained.up.weights["layer.A"]) == 8.0
    assert float(trained.model["layer.A"]) == 7.0


def test_the_last_of_an_odd_number_of_mini_batches_is_paired_with_the_first() -> None:
    problems, _ = turned(PerFedAvg(**RATES), [0] * 7, BATCHES)
    assert [batch for _, batch in asked(problems)] == [1, 2, 3, 4, 5, 1, 1]


@pytest.mark.parametrize(("mini", "steps"), [(BATCHES[:2], [1, 2, 1]), (BATCHES[:4], [1, 2, 3]), ((), [])])
def test_adapting_goes_through_the_mini_batches(mini: Any, steps: list[int]) -> None:
    pairs = (len(mini) + 1) // 2
    problems, trained = turned(PerFedAvg(adapt=3, **RATES), [0] * 2 * pairs + [4] * len(steps), mini)
    assert [batch for _, batch in asked(problems)][2 * pairs :] == steps
    assert float(trained.model["layer.A"]) == 8 - len(steps)


def test_a_private_head_is_the_clients_own() -> None:
    algorithm, server, a, _ = one_round("private")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    assert image(a.local.mine) == image(number(3 - 1, "head.weight"))
    received = algorithm.model(a.local, algorithm.send(server, "a"))
    assert (float(received["layer.A"]), float(received["head.weight"])) == (9.25, 2.0)


def test_a_frozen_head_is_not_asked_about() -> None:
    _, server, a, _ = one_round("frozen")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    assert a.local.mine == {}
