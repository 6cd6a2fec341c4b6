"""FlexLoRA, one round, two clients of rank 1, by hand.

seed             A = [[1 1] [1 -1]]   B = 0 (2, 2)            (rank 2; a and b hold the first row and column)
client a, n = 1: A = [2 0]            B = [2 0]ᵀ              B A = [[4 0] [0 0]]     head = [[4 0] [0 4]]
client b, n = 3: A = [0 1]            B = [0 4]ᵀ              B A = [[0 0] [0 4]]     head = [[0 8] [0 0]]

p = 1/4, 3/4     M = [[1 0] [0 3]] = 3 · e2 e2ᵀ + 1 · e1 e1ᵀ                      head = [[1 6] [0 1]]

rank 2, exact:   B = [[0 1] [3 0]]    A = [[0 1] [1 0]]
rank 1:          B = [0 3]ᵀ           A = [0 1]               B A = [[0 0] [0 3]], off by the singular value 1

If b alone is heard, M = [[0 0] [0 4]] is of rank 1: of the second direction B is 0 and A the seed's, [1 -1].
"""

from typing import Any

import torch

from celora.algorithms.flexlora import FlexLoRA, Up
from celora.core.adapters import truncated
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.tensor([[1.0, 1.0], [1.0, -1.0]]),
    "layer.B": torch.zeros(2, 2),
    "head.weight": torch.ones(2, 2),
}
END = {
    "a": {
        "layer.A": torch.tensor([[2.0, 0.0]]),
        "layer.B": torch.tensor([[2.0], [0.0]]),
        "head.weight": 4 * torch.eye(2),
    },
    "b": {
        "layer.A": torch.tensor([[0.0, 1.0]]),
        "layer.B": torch.tensor([[0.0], [4.0]]),
        "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]]),
    },
}
EXAMPLES = {"a": 1, "b": 3}
FULL = {"layer.A": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "layer.B": torch.tensor([[0.0, 1.0], [3.0, 0.0]])}
CUT = {"layer.A": torch.tensor([[0.0, 1.0]]), "layer.B": torch.tensor([[0.0], [3.0]])}
HEAD = {"head.weight": torch.tensor([[1.0, 6.0], [0.0, 1.0]])}


def one_round(head: Head) -> tuple[FlexLoRA, Any, dict[str, Any]]:
    algorithm, ended = FlexLoRA(head=head), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(truncated(SEED, 1), EXAMPLES[client])
        down = algorithm.send(server, client)
        assert down.weights == {}
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert all(problem.train(name) for name in ("layer.A", "layer.B"))
        assert problem.train("head.weight") == (head != "frozen")
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def close(found: Any, expected: Any) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_the_server_keeps_the_average_at_the_largest_rank_by_its_singular_values() -> None:
    _, server, ended = one_round("shared")
    close(server.weights, {**FULL, **HEAD})
    assert server.ranks == {"a": 1, "b": 1}
    assert all(image(ended[c].up) == image(Up(END[c], n)) for c, n in EXAMPLES.items())


def test_a_client_is_sent_its_rank_and_one_that_was_never_heard_cuts_for_itself() -> None:
    algorithm, server, ended = one_round("private")
    own = {"head.weight": END["a"]["head.weight"]}
    close(algorithm.send(server, "a").weights, CUT)
    close(algorithm.model(ended["a"].local, algorithm.send(server, "a")), {**CUT, **own})
    close(algorithm.send(server, "c").weights, FULL)
    small, large = (algorithm.client_init(Stub(truncated(SEED, rank))) for rank in (1, 2))
    close(algorithm.model(small, algorithm.send(server, "c")), CUT)
    close(algorithm.model(large, algorithm.send(server, "c")), FULL)
    problem, _ = turn(algorithm, Stub(truncated(SEED, 1)), ended["a"].local, algorithm.send(server, "a"), {})
    close(problem.weights, {**CUT, **own})


def test_directions_that_the_average_lacks_add_nothing_and_can_be_trained() -> None:
    algorithm = FlexLoRA(head="frozen")
    up = Up({name: END["b"][name] for name in ("layer.A", "layer.B")}, 3)
    server = algorithm.aggregate(algorithm.server_init(SEED, ()), Heard({"b": up}))
    expected = {"layer.A": [[0.0, 1.0], [1.0, -1.0]], "layer.B": [[0.0, 0.0], [4.0, 0.0]]}
    close(server.weights, {name: torch.tensor(rows) for name, rows in expected.items()})
