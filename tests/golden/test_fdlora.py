"""FDLoRA, three rounds, two clients, by hand. ν = 1, μ = 1/2, H = 2; every entry of a matrix is the same number.

round 1, stage 1    a, n = 1, trains θ_p = 4;  b, n = 3, trains θ_p = 12
                    θ_s = (4 + 3·12) / 4 = 10,                  u = 0
round 2             a trains θ_s to 2, b to 8:                  average (2 + 24) / 4 = 6.5
                    g = 3.5,  u = 3.5,                          θ_s <- 10 − (3.5 + 1.75) = 4.75
round 3             both train θ_s to 3.75, and sync
                    g = 1,    u = 1.75 + 1 = 2.75,              θ_s <- 4.75 − (1 + 1.375) = 2.375
fusion of a         the search begins at (0, 0), (1, 0), (1, 1). Of losses 3, 1, 0.98, and 3 from then on, and of an L1
                    of 0.05, (1, 0) is the best: 1 + 0.025 < 0.98 + 0.05. With 0.97 it is (1, 1).
                    So after round 2: θ(w) = 2, or 2 + 4 = 6; received, 4.75, or 4.75 + 4
"""

from typing import Any

import pytest
import torch

from celora.algorithms.fdlora import HALF, FDLoRA, Local
from celora.core.aggregation import Heard
from celora.core.problems import Fit, Score
from celora.core.training import Fitted
from tests.toy import Stub, image, played


def number(value: float, *names: str) -> dict[str, torch.Tensor]:
    names = names or ("layer.A", "layer.B", "head.weight")
    return {name: torch.full((2, 2), float(value)) for name in names}


SEED = number(1)
LOSSES = {"(1, 0)": [3.0, 1.0, 0.98, 3.0, 3.0], "(1, 1)": [3.0, 1.0, 0.97, 3.0, 3.0]}


def scores(losses: list[float]) -> list[dict[str, float]]:
    return [{"loss": loss, "score": 0.5, "rows": 16.0} for loss in losses]


def turned(algorithm: FDLoRA, server: Any, local: Any, answers: list[Any], examples: int = 1) -> Any:
    return played(algorithm, Stub(SEED, examples), local, algorithm.send(server, "a"), answers)


def stage_1(**fields: Any) -> tuple[FDLoRA, Any, Any, Any]:
    algorithm = FDLoRA(budget=5, sync_every=2, **fields)
    server = algorithm.server_init(SEED, ())
    ends = []
    for value, examples in ((4, 1), (12, 3)):
        local = algorithm.client_init(Stub(SEED))
        (problem,), end = turned(algorithm, server, local, [Fitted({**SEED, **number(value)}, {})], examples)
        assert isinstance(problem, Fit) and problem.weights == {}
        ends.append(end)
    a, b = ends
    return algorithm, algorithm.aggregate(server, Heard({"a": a.up, "b": b.up})), a, b


def end(value: float, losses: str = "(1, 0)") -> list[Any]:
    return [Fitted(number(value), {"loss": 1.0}), *scores(LOSSES[losses])]


def test_stage_1_sends_the_personal_model_and_the_mean_is_the_first_common_one() -> None:
    algorithm, server, a, b = stage_1()
    assert image(server.weights) == image(number(10))
    assert image(server.velocity) == image(number(0))
    for ended, value in ((a, 4), (b, 12)):
        assert image(ended.up.weights) == image(ended.local.personal) == image(ended.model) == image(number(value))
        assert (ended.local.turns, ended.local.fusion) == (0, HALF)
    assert image(algorithm.model(a.local, algorithm.send(server, "a"))) == image(number(7))  # half and half


@pytest.mark.parametrize(("losses", "model", "received"), [("(1, 0)", 2, 4.75), ("(1, 1)", 6, 8.75)])
def test_stage_2_trains_the_common_one_fuses_and_steps_with_momentum(
    losses: str, model: float, received: float
) -> None:
    algorithm, server, a, b = stage_1()
    problems, ended = turned(algorithm, server, a.local, end(2, losses))
    assert image(problems[0].weights) == image(number(10))
    assert all(isinstance(p, Score) and (p.split, p.rows) == ("validation", 16) for p in problems[1:])
    tried = [float(p.weights["layer.A"][0, 0]) for p in problems[1:4]]
    assert tried == [0.0, 2.0, 2.0 + 4.0]  # w_1 · 2 + w_2 · 4
    assert image(ended.up.weights) == image(number(2))
    assert image(ended.local.personal) == image(number(4))
    assert image(ended.model) == image(number(model))
    _, other = turned(algorithm, server, b.local, end(8), 3)
    server = algorithm.aggregate(server, Heard({"a": ended.up, "b": other.up}))
    assert image((server.weights, server.velocity)) == image((number(4.75), number(3.5)))
    assert image(algorithm.model(ended.local, algorithm.send(server, "a"))) == image(number(received))


@pytest.mark.parametrize("sync", ["copy", "train"])
def test_every_second_turn_of_stage_2_is_a_sync(sync: Any) -> None:
    algorithm, server, a, b = stage_1(sync=sync)
    first = [turned(algorithm, server, end_.local, end(v), n)[1] for end_, v, n in ((a, 2, 1), (b, 8, 3))]
    server = algorithm.aggregate(server, Heard({"a": first[0].up, "b": first[1].up}))
    again = [Fitted(number(6), {})] if sync == "train" else []
    answers = [end(3.75)[0], *again, *end(3.75)[1:]]
    second = [turned(algorithm, server, one.local, answers, n) for one, n in zip(first, (1, 3), strict=True)]
    if sync == "train":
        assert image(second[0][0][1].weights) == image(number(4))
    for _, ended in second:
        assert image(ended.local.personal) == image(number(6 if sync == "train" else 3.75))
        assert image(ended.up.weights) == image(number(3.75))
    server = algorithm.aggregate(server, Heard({"a": second[0][1].up, "b": second[1][1].up}))
    assert image((server.weights, server.velocity)) == image((number(2.375), number(2.75)))


def test_a_client_that_comes_in_stage_2_trains_both() -> None:
    algorithm, server, _, _ = stage_1()
    local = algorithm.client_init(Stub(SEED))
    assert image(algorithm.model(local, algorithm.send(server, "c"))) == image(number(10))
    problems, ended = turned(algorithm, server, local, [Fitted(number(5), {}), *end(2)])
    assert (problems[0].weights, image(problems[1].weights)) == ({}, image(number(10)))
    assert image(ended.local.personal) == image(number(5))
    assert image(ended.up.weights) == image(number(2))


def test_a_private_head_of_the_common_model_stays_with_the_client() -> None:
    algorithm, server, a, _ = stage_1(head="private")
    factors = ("layer.A", "layer.B")
    assert image(server.weights) == image(number(10, *factors))
    problems, ended = turned(algorithm, server, a.local, end(2))
    assert image(problems[0].weights) == image({**number(10, *factors), **number(4, "head.weight")})
    assert image(ended.local.mine) == image(number(2, "head.weight"))
    assert sorted(ended.up.weights) == list(factors)


def test_a_frozen_head_is_neither_trained_nor_fused() -> None:
    algorithm, server, a, _ = stage_1(head="frozen")
    problems, ended = turned(algorithm, server, a.local, end(2))
    assert not problems[0].train("head.weight")
    assert sorted(ended.model) == sorted(ended.local.personal) == ["layer.A", "layer.B"]
    assert all(image(p.weights["head.weight"]) == image(SEED["head.weight"]) for p in problems[1:])


def test_without_validation_rows_the_two_are_halved() -> None:
    algorithm, server, a, _ = stage_1()
    problems, ended = turned(algorithm, server, a.local, [Fitted(number(2), {}), {"rows": 0.0}])
    assert len(problems) == 2
    assert ended.local.fusion == HALF
    assert image(ended.model) == image(number(3))


def test_before_any_turn_and_any_average_there_is_nothing_to_predict_with_but_the_seed() -> None:
    algorithm = FDLoRA()
    assert algorithm.model(Local({}, {}, 0, HALF), algorithm.send(algorithm.server_init(SEED, ()), "a")) == {}
