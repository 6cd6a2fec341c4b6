"""FedMosaic, one round, three clients, r = 1, by hand.

τ = 1 / ln 3, so exp(S / τ) = 3^S. Gradients of the head (2 × 2), each the mean of two mini-batches:

    v_a = [[2 0] [0 0]]    v_b = [[0 5] [0 0]]    v_c = [[1 0] [0 0]]        S_ab = S_bc = 0, S_ac = 1

        W = [ 0   1/4  3/4 ]       P_a =  4   Q_a = 1       P̄_a = 8/4 + 36/4 = 11    Q̄_a = 2/4 + 12/4 = 7/2
            [ 1/2  0   1/2 ]       P_b =  8   Q_b = 2       P̄_b = (4 + 12)/2 =  8    Q̄_b = (1 + 4)/2  = 5/2
            [ 3/4 1/4   0  ]       P_c = 12   Q_c = 4       P̄_c = 12/4 + 8/4 =  5    Q̄_c = 3/4 + 2/4  = 5/4

With A = [1 0], B = [1 0]ᵀ and x = [2 0]ᵀ, a says 4·2 + 1 = 9 and the others say 11·2 + 7/2 = 51/2 to it; at β = 0 both
count half: 69/4; at β = ln 3 they count 1/4 and 3/4: 9/4 + 153/8 = 171/8.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.fedmosaic import Down, FedMosaic, Local, Up
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.algorithm import Head, Mixing, Trained
from celora.core.problems import Fit, Gradient
from celora.core.training import Fitted, GradientResult
from tests.toy import Stub, image


def one(value: float) -> Tensor:
    return torch.tensor([[float(value)]])


def at(row: int, column: int, value: float) -> Tensor:
    matrix = torch.zeros(2, 2)
    matrix[row, column] = value
    return matrix


ZERO = {f"layer.{name}": one(0) for name in ("P", "Q", "P2", "Q2", "G")}
SEED = {
    "layer.A": torch.tensor([[1.0, 0.0]]),
    "layer.B": torch.tensor([[1.0], [0.0]]),
    **ZERO,
    "head.weight": torch.ones(2, 2),
}
P, Q = {"a": 4, "b": 8, "c": 12}, {"a": 1, "b": 2, "c": 4}
SLOPES = {"a": at(0, 0, 2), "b": at(0, 1, 5), "c": at(0, 0, 1)}
HEADS = {"a": 4 * torch.eye(2), "b": torch.tensor([[0.0, 8.0], [0.0, 0.0]]), "c": torch.ones(2, 2)}
EXAMPLES = {"a": 1, "b": 3, "c": 2}
W = [[0, 1 / 4, 3 / 4], [1 / 2, 0, 1 / 2], [3 / 4, 1 / 4, 0]]
OTHERS = {"a": (11, 3.5), "b": (8, 2.5), "c": (5, 1.25)}


class Two(Stub):
    """A stub with two mini-batches, of more."""

    def batches(self, size: int | None = None) -> Any:
        return iter([{}, {}, {}])


def algorithm(**fields: Any) -> FedMosaic:
    return FedMosaic(**{"temperature": 1 / math.log(3), "batches": 2, "noise": 0, **fields})


def cores(client: str) -> dict[str, Tensor]:
    return {"layer.P": one(P[client]), "layer.Q": one(Q[client])}


def others(p: float, q: float) -> dict[str, Tensor]:
    return {"layer.P2": one(p), "layer.Q2": one(q)}


def turn(
    method: FedMosaic, client: str, local: Local, down: Down, gradient_at: Tensor
) -> tuple[Fit, Trained[Local, Up]]:
    """A client's turn: the problem it poses after its gradient was told, and what came of it."""
    steps = method.train(Two(SEED, EXAMPLES[client]), local, down)
    problem = next(steps)
    for factor in (0.5, 1.5):
        assert isinstance(problem, Gradient)
        assert dict(problem.weights) == {}  # at the frozen backbone
        assert [name for name in SEED if problem.names(name)] == ["head.weight"]
        problem = steps.send(GradientResult(1.0, {"head.weight": factor * gradient_at}))
    assert isinstance(problem, Fit)
    end = {**cores(client), "layer.G": one(P[client] / 4), "head.weight": HEADS[client]}
    try:
        steps.send(Fitted({**SEED, **problem.weights, **end}, {}))
    except StopIteration as stop:
        return problem, stop.value
    raise AssertionError("one problem too many")


def one_round(method: FedMosaic, clients: str = "abc") -> tuple[Any, dict[str, Trained[Local, Up]]]:
    server, ended = method.server_init(SEED, ()), {}
    for client in clients:
        down = method.send(server, client)
        assert image(down) == image(Down({}))
        problem, ended[client] = turn(method, client, Local({}, None, {}), down, SLOPES[client])
        trained = {name for name in SEED if problem.train(name)}
        assert trained == {"layer.P", "layer.Q", "layer.G"} | ({"head.weight"} if method.head != "frozen" else set())
    return method.aggregate(server, Heard({client: trained.up for client, trained in ended.items()})), ended


def test_the_others_are_weighed_by_likeness_and_the_client_itself_is_left_out() -> None:
    server, _ = one_round(algorithm())
    assert server.mixing.clients == ("a", "b", "c")
    torch.testing.assert_close(server.mixing.weights, torch.tensor(W, dtype=torch.float64))


def test_everybody_gets_its_average_of_the_others_and_keeps_its_own() -> None:
    method = algorithm()
    server, ended = one_round(method)
    for client, trained in ended.items():
        own = {**cores(client), "layer.G": one(P[client] / 4), "head.weight": HEADS[client]}
        assert image(trained.up.weights) == image(cores(client))
        assert image(trained.local.own) == image(cores(client))
        assert sorted(trained.local.mine) == ["head.weight", "layer.G"]
        down = method.send(server, client)
        torch.testing.assert_close(down.weights, others(*OTHERS[client]))
        assert image(method.model(trained.local, down)) == image({**own, **down.weights})
        problem, _ = turn(method, client, trained.local, down, SLOPES[client])
        assert image(dict(problem.weights)) == image({**own, **down.weights})


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 69 / 4), (math.log(3), 171 / 8)])
def test_the_gate_weighs_the_two(beta: float, expected: float) -> None:
    method = algorithm()
    server, ended = one_round(method)
    weights = {**SEED, **method.model(ended["a"].local, method.send(server, "a")), "layer.G": one(beta)}
    (w,) = modules(weights).values()
    torch.testing.assert_close(method.family.delta(torch.tensor([[2.0, 0.0]]), w), torch.tensor([[expected, 0.0]]))


def test_gradients_are_a_moving_average_over_rounds() -> None:
    method = algorithm(memory=0.25)
    server, ended = one_round(method)
    sent = ended["a"].up.summary
    assert sent is not None and sorted(sent.tolist()) == [0, 0, 0, 2]
    _, later = turn(method, "a", ended["a"].local, method.send(server, "a"), at(0, 0, 6))
    assert later.up.summary is not None and sorted(later.up.summary.tolist()) == [0, 0, 0, 0.25 * 2 + 0.75 * 6]


def test_all_send_the_same_coordinates() -> None:
    method = algorithm(coordinates=1, sketch_seed=5)
    sent = [
        turn(method, "a", Local({}, None, {}), Down({}), at(row, column, 1))[1].up.summary
        for row in range(2)
        for column in range(2)
    ]
    assert sorted(v.tolist() for v in sent if v is not None) == [[0.0], [0.0], [0.0], [1.0]]


def test_who_is_away_still_counts_who_is_new_gets_nothing_yet_and_who_is_alone_nothing() -> None:
    method = algorithm()
    server, ended = one_round(method)
    later = method.aggregate(server, Heard({"a": ended["a"].up}))
    assert image(later) == image(server)
    assert image(method.send(server, "d")) == image(Down({}))
    alone, _ = one_round(method, "a")
    assert image(method.send(alone, "a")) == image(Down({}))
    assert alone.mixing.weights.tolist() == [[0.0]]


def test_who_tells_nothing_or_something_odd_is_like_nobody() -> None:
    method = algorithm()
    start = method.server_init(SEED, ())
    _, ended = one_round(method)
    for summary in (None, torch.ones(3)):
        ups = {client: trained.up for client, trained in ended.items()} | {"a": Up(cores("a"), 1, summary)}
        mixing: Mixing = method.aggregate(start, Heard(ups)).mixing
        torch.testing.assert_close(mixing.weights, (1 - torch.eye(3, dtype=torch.float64)) / 2)


@pytest.mark.parametrize("head", ["shared", "frozen"])
def test_a_shared_head_is_averaged_by_rows_and_a_frozen_one_is_nowhere(head: Head) -> None:
    method = algorithm(head=head)
    server, ended = one_round(method, "ab")
    assert list(ended["a"].local.mine) == ["layer.G"]
    averaged = {"head.weight": torch.tensor([[1.0, 6.0], [0.0, 1.0]])} if head == "shared" else {}
    assert image(method.send(server, "a").weights) == image({**others(8, 2), **averaged})
