"""FLoRA, two rounds, a client of rank 1 and one of rank 2, by hand.

seed             A = [[1 1] [1 1]]    B = 0 (2, 2)    W = 0 (2, 2)
client a, n = 1: A = [8 4]            B = [1 0]ᵀ             B A = [[8 4] [0 0]]     head = [[4 0] [0 4]]
client b, n = 3: A = [[4 0] [0 4]]    B = [[0 1] [2 0]]      B A = [[0 4] [8 0]]     head = [[0 8] [0 0]]

p = 1/4, 3/4     stack A = [[2 1] [3 0] [0 3]], B = [[1 0 1] [0 2 0]]               head = [[1 6] [0 1]]
                 W = [[2 1+3] [6 0]] = [[2 4] [6 0]] = 1/4 [[8 4] [0 0]] + 3/4 [[0 4] [8 0]]

Round 2: everybody merges that, and starts from B = 0 and an A whose entries are the seed's in another order (all 1).
a alone is heard, with A = [1 0], B = [0 1]ᵀ: the stack is that, and W = [[2 4] [7 0]]. a, who has the version before,
is sent the stack; b, who was not heard and is one more behind, W.
"""

from typing import Any

import pytest
import torch

from celora.algorithms.flora import FLoRA, Up
from celora.core.adapters import truncated
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.ones(2, 2),
    "layer.B": torch.zeros(2, 2),
    "layer.W": torch.zeros(2, 2),
    "head.weight": torch.ones(2, 2),
}
END = {
    "a": {
        "layer.A": torch.tensor([[8.0, 4.0]]),
        "layer.B": torch.tensor([[1.0], [0.0]]),
        "head.weight": 4 * torch.eye(2),
    },
    "b": {
        "layer.A": 4 * torch.eye(2),
        "layer.B": torch.tensor([[0.0, 1.0], [2.0, 0.0]]),
        "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]]),
    },
}
EXAMPLES, RANKS = {"a": 1, "b": 3}, {"a": 1, "b": 2}
STACK_A = torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.0, 3.0]])
STACK_B = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
W = torch.tensor([[2.0, 4.0], [6.0, 0.0]])
HEAD = torch.tensor([[1.0, 6.0], [0.0, 1.0]])
AGAIN = {"layer.A": torch.tensor([[1.0, 0.0]]), "layer.B": torch.tensor([[0.0], [1.0]])}


def one_round(head: Head) -> tuple[FLoRA, Any, dict[str, Any]]:
    algorithm, ended = FLoRA(head=head), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(truncated(SEED, RANKS[client]), EXAMPLES[client])
        down = algorithm.send(server, client)
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert [n for n in ("layer.A", "layer.B", "layer.W") if problem.train(n)] == ["layer.A", "layer.B"]
        assert problem.train("head.weight") == (head != "frozen")
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_the_stack_is_weighted_on_one_side_and_merged() -> None:
    algorithm, server, ended = one_round("shared")
    assert all(image(ended[c].up) == image(Up(END[c], n)) for c, n in EXAMPLES.items())
    down = algorithm.send(server, "a")
    assert image(down.base.last["layer.W"].b) == image(STACK_B)
    assert image(down.base.last["layer.W"].a) == image(STACK_A)
    assert down.base.total == {}
    assert image(down.head) == image({"head.weight": HEAD})
    for client, trained in ended.items():
        received = algorithm.model(trained.local, algorithm.send(server, client))
        assert image(received) == image({"layer.W": W, "head.weight": HEAD})


@pytest.mark.parametrize("head", ["private", "frozen"])
def test_a_head_that_is_not_shared_does_not_travel(head: Head) -> None:
    algorithm, server, ended = one_round(head)
    received = algorithm.model(ended["a"].local, algorithm.send(server, "a"))
    assert sorted(ended["a"].up.weights) == ["layer.A", "layer.B"]
    assert image(received) == image(
        {"layer.W": W} | ({"head.weight": END["a"]["head.weight"]} if head == "private" else {})
    )


def test_the_next_training_starts_from_a_new_adapter_over_the_merged_weights() -> None:
    algorithm, server, ended = one_round("frozen")
    learner = Stub(truncated(SEED, 1))
    problem, trained = turn(algorithm, learner, ended["a"].local, algorithm.send(server, "a"), AGAIN)
    start = {"layer.A": torch.ones(1, 2), "layer.B": torch.zeros(2, 1), "layer.W": W}
    assert image(dict(sorted(problem.weights.items()))) == image(start)
    assert image(trained.local.base.total) == image({"layer.W": W})
    assert sorted(trained.up.weights) == ["layer.A", "layer.B"]


def test_one_behind_is_sent_the_stack_and_more_behind_w() -> None:
    algorithm, first, ended = one_round("frozen")
    _, trained = turn(algorithm, Stub(truncated(SEED, 1)), ended["a"].local, algorithm.send(first, "a"), AGAIN)
    second, after = algorithm.aggregate(first, Heard({"a": trained.up})), torch.tensor([[2.0, 4.0], [7.0, 0.0]])
    one, more = algorithm.send(second, "a").base, algorithm.send(second, "b").base
    assert (one.total, list(one.last)) == ({}, ["layer.W"])
    assert image((more.total, dict(more.last))) == image(({"layer.W": after}, {}))
    for local, client in ((trained.local, "a"), (ended["b"].local, "b")):
        assert image(algorithm.model(local, algorithm.send(second, client))) == image({"layer.W": after})
