"""pFedMe, one round, two clients, by hand.

λ = 2, inner_lr = 1/4, K = 2, η = 1/4 (so ηλ = 1/2), β = 1/2, no clipping; seed A = 8, and everything is a number.
Client a, n = 1, one mini-batch:

    w = 8, θ = 8     ∇f = 4     θ <- 8 − 1/4 (4 + 2·0) = 7
           θ = 7     ∇f = 6     θ <- 7 − 1/4 (6 + 2 (7 − 8)) = 6
                                w <- 8 − 1/2 (8 − 6) = 7

Client b, n = 3, two mini-batches: the first as a's; then from w = 7, θ = 6, which goes on where it was:

           θ = 6     ∇f = -2    θ <- 6 − 1/4 (-2 + 2 (6 − 7)) = 7
           θ = 7     ∇f = 16    θ <- 7 − 1/4 (16 + 2 · 0) = 3
                                w <- 7 − 1/2 (7 − 3) = 5

server     Σ p_i w_i = (7 + 3·5) / 4 = 5.5,   w <- (8 + 5.5) / 2 = 6.75
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from celora.algorithms.pfedme import PFedMe
from celora.core.aggregation import Heard
from celora.core.problems import Gradient
from celora.core.training import GradientResult
from tests.toy import RECIPE, Stub, image, played

RATES: dict[str, Any] = {"lam": 2.0, "inner_lr": 0.25, "inner_steps": 2, "eta": 0.25, "beta": 0.5}
FREE = replace(RECIPE, clip=0.0)


def number(value: float, *names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((1, 1), float(value)) for name in names}


SEED = {**number(8, "layer.A", "layer.B"), **number(3, "head.weight")}
FIRST, SECOND = {"x": torch.zeros(1)}, {"x": torch.ones(1)}
SLOPES = {"a": (4, 6), "b": (4, 6, -2, 16)}
THETA, W = {"a": 6.0, "b": 3.0}, {"a": 7.0, "b": 5.0}


def one_round(head: str) -> tuple[PFedMe, Any, dict[str, Any], dict[str, Any]]:
    algorithm, ended, posed = PFedMe(head=head, **RATES), {}, {}
    names = ("layer.A", "layer.B") if head == "frozen" else tuple(SEED)
    server = algorithm.server_init(SEED, ())
    for client, examples, mini in (("a", 1, (FIRST,)), ("b", 3, (FIRST, SECOND))):
        learner = Stub(SEED, examples, recipe=FREE, mini=mini)
        answers = [GradientResult(1.0, number(g, *names)) for g in SLOPES[client]]
        local, down = algorithm.client_init(learner), algorithm.send(server, client)
        posed[client], ended[client] = played(algorithm, learner, local, down, answers)
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended, posed


def test_theta_descends_and_w_follows_it() -> None:
    _, _, ended, posed = one_round("shared")
    for client in "ab":
        assert image(ended[client].model["layer.A"]) == image(number(THETA[client], "layer.A")["layer.A"])
        assert float(ended[client].model["head.weight"]) == THETA[client] - 5  # from 3, and not from 8
        assert float(ended[client].up.weights["layer.A"]) == W[client]
    asked = [(p.batch, float(p.weights["layer.A"])) for p in posed["b"] if isinstance(p, Gradient)]
    assert asked == [(FIRST, 8.0), (FIRST, 7.0), (SECOND, 6.0), (SECOND, 7.0)]


def test_the_server_goes_beta_of_the_way_and_sends_nothing_before() -> None:
    algorithm, server, ended, _ = one_round("shared")
    assert algorithm.send(algorithm.server_init(SEED, ()), "a").weights == {}
    assert float(server.weights["layer.A"]) == 6.75
    assert float(server.weights["head.weight"]) == 6.75 - 5
    assert ended["a"].local.mine == {}
    assert float(algorithm.model(ended["a"].local, algorithm.send(server, "a"))["layer.B"]) == 6.75


def test_a_private_head_is_the_clients_own_w() -> None:
    algorithm, server, ended, _ = one_round("private")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    assert image(ended["b"].local.mine) == image(number(W["b"] - 5, "head.weight"))
    received = algorithm.model(ended["b"].local, algorithm.send(server, "b"))
    assert (float(received["layer.A"]), float(received["head.weight"])) == (6.75, 0.0)


def test_a_frozen_head_is_not_asked_about() -> None:
    _, server, ended, posed = one_round("frozen")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    assert ended["a"].local.mine == {}
    assert not any(problem.names("head.weight") for problem in posed["a"])


def test_the_whole_step_is_clipped() -> None:
    """K = 1: from θ = w = 8 a gradient of (3, 4) is of length 5, so at a clip of 1 it is a fifth."""
    algorithm = PFedMe(head="frozen", **{**RATES, "inner_steps": 1})
    learner = Stub(SEED, recipe=replace(RECIPE, clip=1.0), mini=(FIRST,))
    gradient_at = GradientResult(1.0, {**number(3, "layer.A"), **number(4, "layer.B")})
    down = algorithm.send(algorithm.server_init(SEED, ()), "a")
    _, trained = played(algorithm, learner, algorithm.client_init(learner), down, [gradient_at])
    assert float(trained.model["layer.A"]) == pytest.approx(8 - 0.25 * 3 / 5)
    assert float(trained.model["layer.B"]) == pytest.approx(8 - 0.25 * 4 / 5)
