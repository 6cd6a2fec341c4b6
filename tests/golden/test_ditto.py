"""Ditto, one round, two clients, by hand.

seed             A = [1 1]   B = [0 0]ᵀ   head = [[1 1] [1 1]]         λ = 0.5
client a, n = 1: w = (A = [1  2], B = [1 0]ᵀ, 4 I)           v = (A = [1 0], B = [2 2]ᵀ, 0)
client b, n = 3: w = (A = [5 -2], B = [1 4]ᵀ, [[0 8] [0 0]]) v = (A = [0 1], B = [0 1]ᵀ, 2 I)

p = 1/4, 3/4     A = [4 -1]   B = [1 3]ᵀ   head = [[1 6] [0 1]]

At v = (A = [1 0], B = [2 2]ᵀ, head 0) the penalty of round 1 is 0.5/2 (‖[0 -1]‖² + ‖[2 2]‖² + ‖-1‖² · 4)
= 1/4 (1 + 8 + 4) = 13/4, and that of round 2 is 1/4 (9 + 1 + (1 + 1) + (1 + 36 + 0 + 1)) = 50/4.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.ditto import Ditto
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from celora.core.problems import Fit
from celora.core.training import Fitted
from tests.toy import Stub, image, played


def weights(a: list[float], b: list[float], head: Tensor) -> dict[str, Tensor]:
    return {"layer.A": torch.tensor([a]), "layer.B": torch.tensor([b]).mT.contiguous(), "head.weight": head}


SEED = weights([1, 1], [0, 0], torch.ones(2, 2))
W = {
    "a": weights([1, 2], [1, 0], 4 * torch.eye(2)),
    "b": weights([5, -2], [1, 4], torch.tensor([[0.0, 8.0], [0.0, 0.0]])),
}
V = {"a": weights([1, 0], [2, 2], torch.zeros(2, 2)), "b": weights([0, 1], [0, 1], 2 * torch.eye(2))}
EXAMPLES = {"a": 1, "b": 3}
AVERAGE = weights([4, -1], [1, 3], torch.tensor([[1.0, 6.0], [0.0, 1.0]]))


def one_round(head: Head) -> tuple[Ditto, Any, dict[str, Any], dict[str, Any]]:
    algorithm, ended, posed = Ditto(head=head, lam=0.5), {}, {}
    server = algorithm.server_init(SEED, ())
    for client in "ab":
        learner = Stub(SEED, EXAMPLES[client])
        local, down = algorithm.client_init(learner), algorithm.send(server, client)
        answers = [Fitted(W[client], {"loss": 1.0}), Fitted(V[client], {"loss": 2.0})]
        posed[client], ended[client] = played(algorithm, learner, local, down, answers)
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended, posed


def test_w_is_averaged_and_v_stays() -> None:
    algorithm, server, ended, posed = one_round("shared")
    assert image(server.weights) == image(AVERAGE)
    for client, trained in ended.items():
        assert image(trained.up.weights) == image(W[client])
        assert image(trained.local.personal) == image(trained.model) == image(V[client])
        assert trained.local.mine == {}
        assert image(algorithm.model(trained.local, algorithm.send(server, client))) == image(AVERAGE)
    for problem in posed["a"]:
        assert isinstance(problem, Fit) and problem.train("layer.A") and problem.train("head.weight")


def test_the_penalty_is_half_lambda_times_the_square_of_the_distance_to_the_received_model() -> None:
    algorithm, server, ended, (first, second) = *one_round("shared")[:3], one_round("shared")[3]["a"]
    assert first.penalty is None
    assert float(second.penalty(V["a"])) == 13 / 4
    (first, second), _ = played(
        algorithm, Stub(SEED), ended["a"].local, algorithm.send(server, "a"), [Fitted(W["a"], {})] * 2
    )
    assert image(first.weights) == image(AVERAGE)
    assert image(second.weights) == image(V["a"])
    assert float(second.penalty(V["a"])) == 50 / 4


def test_under_a_private_head_w_and_v_have_one_each_and_neither_travels() -> None:
    algorithm, server, ended, _ = one_round("private")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    for client, trained in ended.items():
        assert image(trained.local.mine) == image({"head.weight": W[client]["head.weight"]})
        assert image(trained.local.personal) == image(V[client])
    down = algorithm.send(server, "a")
    (first, second), _ = played(algorithm, Stub(SEED), ended["a"].local, down, [Fitted(W["a"], {})] * 2)
    assert image(first.weights) == image({**AVERAGE, "head.weight": W["a"]["head.weight"]})
    assert float(second.penalty(V["a"])) == pytest.approx(12 / 4)  # 9 + 1 + 1 + 1: the head is not pulled


def test_a_frozen_head_is_neither_trained_nor_kept_nor_sent() -> None:
    _, server, ended, posed = one_round("frozen")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    assert sorted(ended["a"].local.personal) == ["layer.A", "layer.B"]
    assert not any(problem.train("head.weight") for problem in posed["a"])
