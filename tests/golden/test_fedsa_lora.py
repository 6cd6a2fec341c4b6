"""FedSA-LoRA, one round, two clients, by hand.

seed             A = [1 1]    B = [0 0]ᵀ   head = [[1 1] [1 1]]
client a, n = 1: A = [1  2]   B = [1 0]ᵀ   head = [[4 0] [0 4]]
client b, n = 3: A = [5 -2]   B = [1 4]ᵀ   head = [[0 8] [0 0]]

p = 1/4, 3/4     A = [(1 + 15)/4  (2 - 6)/4] = [4 -1]; everybody keeps B, and a private head

After download a predicts with [1 0]ᵀ [4 -1] = [[4 -1] [0 0]], b with [1 4]ᵀ [4 -1] = [[4 -1] [16 -4]].
"""

from typing import Any

import torch

from celora.algorithms.fedsa_lora import FedSALoRA
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {"layer.A": torch.ones(1, 2), "layer.B": torch.zeros(2, 1), "head.weight": torch.ones(2, 2)}
END = {
    "a": {
        "layer.A": torch.tensor([[1.0, 2.0]]),
        "layer.B": torch.tensor([[1.0], [0.0]]),
        "head.weight": 4 * torch.eye(2),
    },
    "b": {
        "layer.A": torch.tensor([[5.0, -2.0]]),
        "layer.B": torch.tensor([[1.0], [4.0]]),
        "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]]),
    },
}
EXAMPLES = {"a": 1, "b": 3}
A = torch.tensor([[4.0, -1.0]])
PREDICTS = {"a": [[4.0, -1.0], [0.0, 0.0]], "b": [[4.0, -1.0], [16.0, -4.0]]}


def one_round(head: Head) -> tuple[FedSALoRA, Any, dict[str, Any]]:
    algorithm, ended = FedSALoRA(head=head), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(SEED, EXAMPLES[client])
        down = algorithm.send(server, client)
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert problem.train("layer.A")
        assert problem.train("layer.B")
        assert problem.train("head.weight") == (head != "frozen")
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_a_is_averaged_and_meets_each_clients_own_b_and_head() -> None:
    algorithm, server, ended = one_round("private")
    assert image(server.weights) == image({"layer.A": A})
    for client, trained in ended.items():
        assert image(trained.up.weights) == image({"layer.A": END[client]["layer.A"]})
        assert sorted(trained.local.mine) == ["head.weight", "layer.B"]
        received = algorithm.model(trained.local, algorithm.send(server, client))
        assert image(received) == image({**END[client], "layer.A": A})
        assert (received["layer.B"] @ received["layer.A"]).tolist() == PREDICTS[client]


def test_the_next_training_starts_from_the_average_and_the_own_b() -> None:
    algorithm, server, ended = one_round("private")
    problem, _ = turn(algorithm, Stub(SEED), ended["b"].local, algorithm.send(server, "b"), {})
    assert image(problem.weights) == image({**END["b"], "layer.A": A})


def test_a_shared_head_is_averaged_with_a() -> None:
    _, server, ended = one_round("shared")
    head = torch.tensor([[1.0, 6.0], [0.0, 1.0]])
    assert image(server.weights) == image({"layer.A": A, "head.weight": head})
    assert all(list(trained.local.mine) == ["layer.B"] for trained in ended.values())


def test_of_a_frozen_head_nothing_is_kept_or_sent() -> None:
    _, server, ended = one_round("frozen")
    assert list(server.weights) == ["layer.A"]
    assert all(list(trained.local.mine) == ["layer.B"] for trained in ended.values())
