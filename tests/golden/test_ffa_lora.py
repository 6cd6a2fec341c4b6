"""FFA-LoRA, one round, two clients, by hand.

seed             A = [1 2]   B = [0 0]ᵀ   head = [[1 1] [1 1]]
client a, n = 1:             B = [2 0]ᵀ   head = [[4 0] [0 4]]      B A = [[2 4] [0 0]]
client b, n = 3:             B = [2 4]ᵀ   head = [[0 8] [0 0]]      B A = [[2 4] [4 8]]

p = 1/4, 3/4     B = [(2 + 6)/4  (0 + 12)/4]ᵀ = [2 3]ᵀ           head = [[1 6] [0 1]]

B A of the average is [[2 4] [3 6]], and so is the average of B A, [[(2 + 6)/4 (4 + 12)/4] [12/4 24/4]]: exact.
"""

from typing import Any

import torch

from celora.algorithms.ffa_lora import FFALoRA
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {"layer.A": torch.tensor([[1.0, 2.0]]), "layer.B": torch.zeros(2, 1), "head.weight": torch.ones(2, 2)}
END = {
    "a": {"layer.B": torch.tensor([[2.0], [0.0]]), "head.weight": 4 * torch.eye(2)},
    "b": {"layer.B": torch.tensor([[2.0], [4.0]]), "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]])},
}
EXAMPLES = {"a": 1, "b": 3}
B = {"layer.B": torch.tensor([[2.0], [3.0]])}
HEAD = {"head.weight": torch.tensor([[1.0, 6.0], [0.0, 1.0]])}


def one_round(head: Head) -> tuple[FFALoRA, Any, dict[str, Any]]:
    algorithm, ended = FFALoRA(head=head), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(SEED, EXAMPLES[client])
        down = algorithm.send(server, client)
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert not problem.train("layer.A")
        assert problem.train("layer.B")
        assert problem.train("head.weight") == (head != "frozen")
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_b_and_a_shared_head_are_averaged_and_a_never_travels() -> None:
    algorithm, server, ended = one_round("shared")
    for client, trained in ended.items():
        assert image(trained.up.weights) == image(END[client])
        assert trained.local.mine == {}
        assert image(algorithm.model(trained.local, algorithm.send(server, client))) == image({**B, **HEAD})


def test_a_private_head_stays_under_the_average() -> None:
    algorithm, server, ended = one_round("private")
    for client, trained in ended.items():
        own = {"head.weight": END[client]["head.weight"]}
        assert image(trained.local.mine) == image(own)
        assert image(algorithm.model(trained.local, algorithm.send(server, client))) == image({**B, **own})


def test_of_a_frozen_head_nothing_is_kept_or_sent() -> None:
    _, server, ended = one_round("frozen")
    assert image(server.weights) == image(B)
    assert all(trained.local.mine == {} and list(trained.up.weights) == ["layer.B"] for trained in ended.values())


def test_the_update_served_is_the_mean_of_the_updates_made() -> None:
    _, server, _ = one_round("shared")
    assert (server.weights["layer.B"] @ SEED["layer.A"]).tolist() == [[2.0, 4.0], [3.0, 6.0]]
    made = [n / 4 * END[client]["layer.B"] @ SEED["layer.A"] for client, n in EXAMPLES.items()]
    assert sum(made).tolist() == [[2.0, 4.0], [3.0, 6.0]]  # type: ignore[union-attr]
