"""FedEx-LoRA, one round, two clients, by hand; the numbers of FedIT's.

seed             A = [1 1]    B = [0 0]ᵀ   W = 0 (2, 2)
client a, n = 1: A = [1  2]   B = [1 0]ᵀ   head = [[4 0] [0 4]]     B A = [[1 2] [0 0]]
client b, n = 3: A = [5 -2]   B = [1 4]ᵀ   head = [[0 8] [0 0]]     B A = [[5 -2] [20 -8]]

p = 1/4, 3/4     A = [4 -1],  B = [1 3]ᵀ,  head = [[1 6] [0 1]],    B A = [[4 -1] [12 -3]]
                 Σ p_i B_i A_i = [[4 -1] [15 -6]],                  R = [[0 0] [3 -3]]
as factors       B_i − B = [0 -3]ᵀ, [0 1]ᵀ    p_i (A_i − A) = [-3/4 3/4], [3/4 -3/4]

Then B A + W = [[4 -1] [15 -6]]. R is of rank 1, so nothing is lost with rank = 1.
"""

from typing import Any

import pytest
import torch

from celora.algorithms.fedex_lora import FedExLoRA, Up
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.ones(1, 2),
    "layer.B": torch.zeros(2, 1),
    "layer.W": torch.zeros(2, 2),
    "head.weight": torch.ones(2, 2),
}
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
FACTORS = {"layer.A": torch.tensor([[4.0, -1.0]]), "layer.B": torch.tensor([[1.0], [3.0]])}
HEAD = {"head.weight": torch.tensor([[1.0, 6.0], [0.0, 1.0]])}
R = {"layer.W": torch.tensor([[0.0, 0.0], [3.0, -3.0]])}


def one_round(head: Head, **fields: Any) -> tuple[FedExLoRA, Any, dict[str, Any]]:
    algorithm, ended = FedExLoRA(head=head, **fields), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(SEED, EXAMPLES[client])
        down = algorithm.send(server, client)
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert [n for n in ("layer.A", "layer.B", "layer.W") if problem.train(n)] == ["layer.A", "layer.B"]
        assert problem.train("head.weight") == (head != "frozen")
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_the_averages_and_the_residual_come_down_and_are_exact_together() -> None:
    algorithm, server, ended = one_round("shared")
    assert all(image(ended[c].up) == image(Up(END[c], n)) for c, n in EXAMPLES.items())
    down = algorithm.send(server, "a")
    assert down.base.last["layer.W"].b.tolist() == [[0.0, 0.0], [-3.0, 1.0]]
    assert down.base.last["layer.W"].a.tolist() == [[-0.75, 0.75], [0.75, -0.75]]
    for client, trained in ended.items():
        received = algorithm.model(trained.local, algorithm.send(server, client))
        assert image(dict(sorted(received.items()))) == image(dict(sorted({**FACTORS, **HEAD, **R}.items())))
        assert (received["layer.B"] @ received["layer.A"] + received["layer.W"]).tolist() == [[4.0, -1.0], [15.0, -6.0]]


def test_a_residual_of_its_own_rank_loses_nothing() -> None:
    algorithm, server, ended = one_round("frozen", rank=1)
    last = algorithm.send(server, "a").base.last["layer.W"]
    assert (last.b.shape, last.a.shape) == ((2, 1), (1, 2))
    received = algorithm.model(ended["a"].local, algorithm.send(server, "a"))
    torch.testing.assert_close(received["layer.W"], R["layer.W"])


@pytest.mark.parametrize("head", ["private", "frozen"])
def test_a_head_that_is_not_shared_does_not_travel(head: Head) -> None:
    algorithm, server, ended = one_round(head)
    own = {"head.weight": END["a"]["head.weight"]} if head == "private" else {}
    received = algorithm.model(ended["a"].local, algorithm.send(server, "a"))
    assert sorted(ended["a"].up.weights) == ["layer.A", "layer.B"]
    assert image(dict(sorted(received.items()))) == image(dict(sorted({**FACTORS, **R, **own}.items())))


def test_the_next_training_starts_from_the_averages_over_w_which_is_kept() -> None:
    algorithm, server, ended = one_round("frozen")
    problem, trained = turn(algorithm, Stub(SEED), ended["b"].local, algorithm.send(server, "b"), END["a"])
    assert image(dict(sorted(problem.weights.items()))) == image(dict(sorted({**FACTORS, **R}.items())))
    assert image(trained.local.base.total) == image(R)
    second = algorithm.aggregate(server, Heard({"b": trained.up}))  # one client's average is its own: the residual is 0
    assert image(algorithm.model(trained.local, algorithm.send(second, "b"))["layer.W"]) == image(R["layer.W"])
    assert image(algorithm.send(second, "a").base.total) == image(R)
