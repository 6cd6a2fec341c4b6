"""FedALT, one round, three clients, by hand.

seed             A = [1  1]    B = [0 0]ᵀ    A2 = [0 0]    B2 = [0 0]ᵀ    G = 0
client a, n = 1: A = [1  2]    B = [1 0]ᵀ
client b, n = 3: A = [5 -2]    B = [1 4]ᵀ
client c, n = 2: A = [3  0]    B = [0 2]ᵀ

the rest of a's world:  A2 = ([5 -2] + [3 0])/2 = [4 -1]    B2 = ([1 4] + [0 2])/2 = [1/2 3]ᵀ
of b's:                 A2 = ([1  2] + [3 0])/2 = [2  1]    B2 = ([1 0] + [0 2])/2 = [1/2 1]ᵀ
of c's:                 A2 = ([1  2] + [5 -2])/2 = [3 0]    B2 = ([1 0] + [1 4])/2 = [1   2]ᵀ
of c's, by rows:        A2 = ([1  2] + 3 [5 -2])/4 = [4 -1] B2 = ([1 0] + 3 [1 4])/4 = [1 3]ᵀ

At x = [1 0]ᵀ: a's own says [1 0]ᵀ, the rest of its world [1/2 3]ᵀ 4 = [2 12]ᵀ. Under G = 0 both count half: [3/2 6]ᵀ;
under G = [[ln 3 0] [0 0]] they count 3/4 and 1/4: [5/4 3]ᵀ.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.fedalt import Down, FedALT, Local
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.algorithm import Head, Trained
from tests.toy import Stub, image, turn


def row(*values: float) -> Tensor:
    return torch.tensor([values])


SEED = {
    "layer.A": row(1.0, 1.0),
    "layer.B": row(0.0, 0.0).T,
    "layer.A2": row(0.0, 0.0),
    "layer.B2": row(0.0, 0.0).T,
    "layer.G": torch.zeros(2, 2),
    "head.weight": torch.ones(2, 2),
}
END = {
    "a": {"layer.A": row(1.0, 2.0), "layer.B": row(1.0, 0.0).T},
    "b": {"layer.A": row(5.0, -2.0), "layer.B": row(1.0, 4.0).T},
    "c": {"layer.A": row(3.0, 0.0), "layer.B": row(0.0, 2.0).T},
}
GATES = {client: torch.full((2, 2), value) for client, value in (("a", 0.0), ("b", 2.0), ("c", 3.0))}
HEADS = {"a": 4 * torch.eye(2), "b": torch.tensor([[0.0, 8.0], [0.0, 0.0]]), "c": torch.ones(2, 2)}
EXAMPLES = {"a": 1, "b": 3, "c": 2}
REST = {"a": ([4.0, -1.0], [0.5, 3.0]), "b": ([2.0, 1.0], [0.5, 1.0]), "c": ([3.0, 0.0], [1.0, 2.0])}


def rest(a2: list[float], b2: list[float]) -> dict[str, Tensor]:
    return {"layer.A2": row(*a2), "layer.B2": row(*b2).T}


def one_round(clients: str = "abc", **fields: Any) -> tuple[FedALT, Any, dict[str, Trained[Local, Any]]]:
    algorithm, ended = FedALT(**fields), {}
    server = algorithm.server_init(SEED, ())
    for client in clients:
        learner = Stub(SEED, EXAMPLES[client])
        down = algorithm.send(server, client)
        assert image(down) == image(Down({}))
        end = {**END[client], "layer.G": GATES[client], "head.weight": HEADS[client]}
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        trained = {name for name in SEED if problem.train(name)}
        assert trained == {"layer.A", "layer.B", "layer.G"} | ({"head.weight"} if algorithm.head != "frozen" else set())
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_everybody_gets_the_mean_of_the_others_and_keeps_its_own() -> None:
    algorithm, server, ended = one_round()
    for client, trained in ended.items():
        assert image(trained.up.weights) == image(END[client])
        assert image(trained.local) == image(
            Local({"layer.G": GATES[client], "head.weight": HEADS[client]}, END[client])
        )
        down = algorithm.send(server, client)
        assert image(down.weights) == image(rest(*REST[client]))
        own = {**END[client], "layer.G": GATES[client], "head.weight": HEADS[client]}
        assert image(algorithm.model(trained.local, down)) == image({**own, **down.weights})
        problem, _ = turn(algorithm, Stub(SEED), trained.local, down, {})
        assert image({**problem.weights}) == image({**own, **down.weights})


def test_by_rows_a_client_with_more_counts_more() -> None:
    algorithm, server, _ = one_round(by_rows=True)
    assert image(algorithm.send(server, "c").weights) == image(rest([4.0, -1.0], [1.0, 3.0]))


def test_who_is_away_still_counts_and_who_is_new_gets_the_mean_of_all() -> None:
    algorithm, server, ended = one_round()
    later = algorithm.aggregate(server, Heard({"a": ended["c"].up}))  # a comes to where c is, and the others are away
    assert image(algorithm.send(later, "a").weights) == image(rest(*REST["a"]))
    assert image(algorithm.send(later, "b").weights) == image(rest([3.0, 0.0], [0.0, 2.0]))
    new = algorithm.send(server, "d").weights
    torch.testing.assert_close(new, rest([3.0, 0.0], [2 / 3, 2.0]))


def test_who_is_alone_gets_nothing() -> None:
    algorithm, server, ended = one_round("b")
    assert image(algorithm.send(server, "b")) == image(Down({}))
    assert image(algorithm.send(server, "a").weights) == image({f"{name}2": w for name, w in END["b"].items()})
    assert image(algorithm.model(ended["b"].local, Down({}))["layer.A"]) == image(END["b"]["layer.A"])


@pytest.mark.parametrize(("own", "expected"), [(0.0, [1.5, 6.0]), (math.log(3), [1.25, 3.0])])
def test_the_gate_weighs_the_two(own: float, expected: list[float]) -> None:
    algorithm, server, ended = one_round()
    weights = algorithm.model(ended["a"].local, algorithm.send(server, "a"))
    (w,) = modules({**weights, "layer.G": torch.tensor([[own, 0.0], [0.0, 0.0]])}).values()
    torch.testing.assert_close(algorithm.family.delta(row(1.0, 0.0), w), row(*expected))


@pytest.mark.parametrize("head", ["shared", "frozen"])
def test_a_shared_head_is_averaged_by_rows_and_a_frozen_one_is_nowhere(head: Head) -> None:
    algorithm, server, ended = one_round("ab", head=head)
    assert list(ended["a"].local.mine) == ["layer.G"]
    got = algorithm.send(server, "a").weights
    averaged = {"head.weight": torch.tensor([[1.0, 6.0], [0.0, 1.0]])} if head == "shared" else {}
    assert image({n: w for n, w in got.items() if n.startswith("head")}) == image(averaged)
