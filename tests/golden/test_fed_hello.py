"""Fed-HeLLo, one round, two clients, two layers, by hand.

seed             A = [1 1]   B = [0 0]ᵀ in both layers   head = [[1 1] [1 1]]
tiers            a, of the first half of the clients, trains 1 layer of 2; b trains both
triangle         a: layer 0 (written 9), b: layers 0 and 1 (written 9 and 10)
client a         layer 0: A = [1  2]  B = [1 0]ᵀ    head = [[4 0] [0 4]]
client b         layer 0: A = [5 -2]  B = [1 4]ᵀ    layer 1: A = [7 7]  B = [2 2]ᵀ    head = [[0 8] [0 0]]

layer 0          A = ([1 2] + [5 -2]) / 2 = [3 0]   B = [1 2]ᵀ        the mean of two
layer 1          A = [7 7]                          B = [2 2]ᵀ        of one, b alone
head             [[2 4] [0 2]]                                        of two

FIM, two rows    squared gradients of layer 0's A: [1 9] and [9 1], mean [5 5], norm 5 √2; of its B: none
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from celora.algorithms.fed_hello import Down, FedHeLLo, Local
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from celora.core.learner import Batch
from celora.core.problems import Gradient
from celora.core.training import Fitted, GradientResult
from tests.toy import Stub, image, turn

SEED = {
    **{f"block.{n}.A": torch.ones(1, 2) for n in (9, 10)},
    **{f"block.{n}.B": torch.zeros(2, 1) for n in (9, 10)},
    "head.weight": torch.ones(2, 2),
}
END = {
    "a": {
        "block.9.A": torch.tensor([[1.0, 2.0]]),
        "block.9.B": torch.tensor([[1.0], [0.0]]),
        "head.weight": 4 * torch.eye(2),
    },
    "b": {
        "block.9.A": torch.tensor([[5.0, -2.0]]),
        "block.9.B": torch.tensor([[1.0], [4.0]]),
        "block.10.A": torch.tensor([[7.0, 7.0]]),
        "block.10.B": torch.tensor([[2.0], [2.0]]),
        "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]]),
    },
}
MEAN = {
    "block.9.A": torch.tensor([[3.0, 0.0]]),
    "block.9.B": torch.tensor([[1.0], [2.0]]),
    "block.10.A": torch.tensor([[7.0, 7.0]]),
    "block.10.B": torch.tensor([[2.0], [2.0]]),
}
HEAD = torch.tensor([[2.0, 4.0], [0.0, 2.0]])


def one_round(head: Head, clients: str = "ab") -> tuple[FedHeLLo, Any, dict[str, Any]]:
    algorithm, ended = FedHeLLo(allocation="triangle", tiers=(0.5, 1.0), head=head), {}
    server = algorithm.server_init(SEED, "ab")
    for client in clients:
        learner, down = Stub(SEED), algorithm.send(server, client)
        assert down.layers == ((0,) if client == "a" else (0, 1))
        end = {n: w for n, w in END[client].items() if head != "frozen" or n != "head.weight"}
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert {name for name in SEED if problem.train(name)} == set(end)
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_each_layer_is_the_mean_of_those_who_trained_it() -> None:
    algorithm, server, ended = one_round("shared")
    assert image(ended["a"].up.weights) == image(END["a"])
    assert image(server.weights) == image({**MEAN, "head.weight": HEAD})
    assert all(image(algorithm.send(server, c).weights) == image(server.weights) for c in "ab")


def test_a_layer_nobody_trained_is_not_sent_and_stays_as_it_was() -> None:
    algorithm, server, _ = one_round("shared", clients="a")
    assert sorted(server.weights) == ["block.9.A", "block.9.B", "head.weight"]
    both = algorithm.aggregate(server, Heard({"b": one_round("shared")[2]["b"].up}))
    only_first = algorithm.aggregate(both, Heard({"a": one_round("shared")[2]["a"].up}))
    for name in ("block.10.A", "block.10.B"):
        assert image(only_first.weights[name]) == image(END["b"][name])


def test_a_private_head_is_kept_and_a_frozen_one_is_not_touched() -> None:
    algorithm, server, ended = one_round("private")
    assert image(server.weights) == image(MEAN)
    for client, trained in ended.items():
        assert image(trained.local.mine) == image({"head.weight": END[client]["head.weight"]})
        received = algorithm.model(trained.local, algorithm.send(server, client))
        assert image(received) == image({**MEAN, "head.weight": END[client]["head.weight"]})
    assert image(one_round("frozen")[1].weights) == image(MEAN)


class TwoRows(Stub):
    """A learner of two rows."""

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        assert size == 1
        yield from ({}, {})


def test_importance_is_the_norm_of_the_mean_squared_gradient() -> None:
    algorithm, none = FedHeLLo(), {name: torch.zeros_like(w) for name, w in SEED.items()}
    steps = algorithm.train(TwoRows(SEED), Local({}), Down({}, (0,), measure=True))
    assert isinstance(next(steps), Gradient)
    assert isinstance(steps.send(GradientResult(1.0, {**none, "block.9.A": torch.tensor([[1.0, 3.0]])})), Gradient)
    steps.send(GradientResult(1.0, {**none, "block.9.A": torch.tensor([[3.0, -1.0]])}))
    with pytest.raises(StopIteration) as end:
        steps.send(Fitted(SEED, {"loss": 1.0, "steps": 1.0}))
    assert end.value.value.up.importance.tolist() == pytest.approx([5 * math.sqrt(2), 0.0])
