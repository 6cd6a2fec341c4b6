"""FedIT, one round, two clients, by hand.

seed             A = [1 1]    B = [0 0]ᵀ   head = 0 (2, 2)        bias = [0 0]
client a, n = 1: A = [1  2]   B = [1 0]ᵀ   head = [[4 0] [0 4]]   bias = [4 0]     B A = [[1 2] [0 0]]
client b, n = 3: A = [5 -2]   B = [1 4]ᵀ   head = [[0 8] [0 0]]   bias = [0 4]     B A = [[5 -2] [20 -8]]

p = 1/4, 3/4     A = [(1 + 15)/4  (2 - 6)/4] = [4 -1]             B = [(1 + 3)/4  (0 + 12)/4]ᵀ = [1 3]ᵀ
              head = [[4/4  24/4] [0  4/4]] = [[1 6] [0 1]]    bias = [4/4  12/4] = [1 3]

B A of the averages is [[4 -1] [12 -3]]; the average of B A is [[4 -1] [15 -6]]. They differ by [[0 0] [3 -3]]:
FedIT's aggregate is off by a norm of sqrt(18).
"""

from math import sqrt
from typing import Any

import pytest
import torch

from celora.algorithms.fedit import FedIT
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.ones(1, 2),
    "layer.B": torch.zeros(2, 1),
    "head.weight": torch.zeros(2, 2),
    "head.bias": torch.zeros(2),
}
END = {
    "a": {
        "layer.A": torch.tensor([[1.0, 2.0]]),
        "layer.B": torch.tensor([[1.0], [0.0]]),
        "head.weight": 4 * torch.eye(2),
        "head.bias": torch.tensor([4.0, 0.0]),
    },
    "b": {
        "layer.A": torch.tensor([[5.0, -2.0]]),
        "layer.B": torch.tensor([[1.0], [4.0]]),
        "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]]),
        "head.bias": torch.tensor([0.0, 4.0]),
    },
}
EXAMPLES = {"a": 1, "b": 3}
FACTORS = {"layer.A": torch.tensor([[4.0, -1.0]]), "layer.B": torch.tensor([[1.0], [3.0]])}
HEAD = {"head.weight": torch.tensor([[1.0, 6.0], [0.0, 1.0]]), "head.bias": torch.tensor([1.0, 3.0])}


def one_round(head: Head) -> tuple[FedIT, Any, dict[str, Any], list[str]]:
    """The algorithm, the server after the round, what each client ended with, and the names that were trained."""
    algorithm, ended, names = FedIT(head=head), {}, list[str]()
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(SEED, EXAMPLES[client])
        down = algorithm.send(server, client)
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert image({**SEED, **problem.weights}) == image(SEED)
        names = [name for name in SEED if problem.train(name)]
    server = algorithm.aggregate(server, Heard({client: trained.up for client, trained in ended.items()}))
    return algorithm, server, ended, names


def test_both_factors_and_a_shared_head_are_averaged_by_rows() -> None:
    algorithm, server, ended, names = one_round("shared")
    assert names == list(SEED)
    for client, trained in ended.items():
        assert image(trained.up.weights) == image(END[client])
        assert trained.up.examples == EXAMPLES[client]
        assert trained.local.mine == {}
        received = algorithm.model(trained.local, algorithm.send(server, client))
        assert image(received) == image({**FACTORS, **HEAD})


def test_a_private_head_stays_under_the_average() -> None:
    algorithm, server, ended, names = one_round("private")
    assert names == list(SEED)
    for client, trained in ended.items():
        own = {name: END[client][name] for name in HEAD}
        assert sorted(trained.up.weights) == sorted(FACTORS)
        assert image(trained.local.mine) == image(own)
        assert image(algorithm.model(trained.local, algorithm.send(server, client))) == image({**FACTORS, **own})


def test_a_frozen_head_is_neither_trained_nor_kept_nor_sent() -> None:
    algorithm, server, ended, names = one_round("frozen")
    assert names == ["layer.A", "layer.B"]
    for client, trained in ended.items():
        assert sorted(trained.up.weights) == sorted(FACTORS)
        assert trained.local.mine == {}
        assert image(algorithm.model(trained.local, algorithm.send(server, client))) == image(FACTORS)


def test_the_aggregate_is_off_by_the_square_root_of_18() -> None:
    _, server, _, _ = one_round("shared")
    served = server.weights["layer.B"] @ server.weights["layer.A"]
    wanted = sum(n / 4 * END[c]["layer.B"] @ END[c]["layer.A"] for c, n in EXAMPLES.items())
    assert (wanted - served).tolist() == [[0.0, 0.0], [3.0, -3.0]]
    assert float((wanted - served).norm()) == pytest.approx(sqrt(18))
