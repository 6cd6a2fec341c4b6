"""HetLoRA, one round, a client of rank 1 and one of rank 2, by hand; then b's next turn, with γ = 1/2.

seed             A = [[1 1] [1 -1]]   B = 0 (2, 2)
client a, n = 3: A = [0 2]            B = [3 4]ᵀ             B A = [[0 6] [0 8]]     head = [[4 0] [0 4]]
client b, n = 1: A = [[6 0] [0 6]]    B = [[3 0] [0 4]]      B A = [[18 0] [0 24]]   head = [[0 8] [0 0]]

‖B A‖            10 and 30, so p = 1/4, 3/4; the head's are n's, 3/4 and 1/4: [[3 2] [0 3]]
                 A = 1/4 [[0 2] [0 0]] + 3/4 [[6 0] [0 6]] = [[4.5 0.5] [0 4.5]]
                 B = 1/4 [[3 0] [4 0]] + 3/4 [[3 0] [0 4]] = [[3 0] [1 3]]

a is sent        A = [4.5 0.5], B = [3 1]ᵀ;   b all of it: its tail is ‖[0 3]‖ ‖[0 4.5]‖ = 13.5
b ends at        A = [[1 0] [0 3]], B = [[1 0] [0 4]]: a tail of 12, less, so its rank is 1 and its A [1 0], B [1 0]ᵀ
   or at         A = [[1 0] [0 4]], B = [[1 0] [0 4]]: a tail of 16, more, and it keeps rank 2

If a alone is heard, A = [[0 2] [1 -1]] and B = [[3 0] [4 0]]: of the second row and column nothing was heard.
"""

from typing import Any

import pytest
import torch

from celora.algorithms.hetlora import HetLoRA, Up
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
        "layer.A": torch.tensor([[0.0, 2.0]]),
        "layer.B": torch.tensor([[3.0], [4.0]]),
        "head.weight": 4 * torch.eye(2),
    },
    "b": {
        "layer.A": 6 * torch.eye(2),
        "layer.B": torch.tensor([[3.0, 0.0], [0.0, 4.0]]),
        "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]]),
    },
}
EXAMPLES, RANKS = {"a": 3, "b": 1}, {"a": 1, "b": 2}
AVERAGE = {"layer.A": torch.tensor([[4.5, 0.5], [0.0, 4.5]]), "layer.B": torch.tensor([[3.0, 0.0], [1.0, 3.0]])}
CUT = {"layer.A": torch.tensor([[4.5, 0.5]]), "layer.B": torch.tensor([[3.0], [1.0]])}
HEAD = {"head.weight": torch.tensor([[3.0, 2.0], [0.0, 3.0]])}


def close(found: Any, expected: Any) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def one_round(head: Head, **fields: Any) -> tuple[HetLoRA, Any, dict[str, Any]]:
    algorithm, ended = HetLoRA(head=head, gamma=0.5, **fields), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(truncated(SEED, RANKS[client]), EXAMPLES[client])
        down = algorithm.send(server, client)
        problem, ended[client] = turn(algorithm, learner, algorithm.client_init(learner), down, end)
        assert all(problem.train(name) for name in ("layer.A", "layer.B"))
        assert problem.train("head.weight") == (head != "frozen")
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_padded_factors_are_averaged_by_the_norms_of_their_products_and_heads_by_rows() -> None:
    _, server, ended = one_round("shared")
    close(server.weights, {**AVERAGE, **HEAD})
    assert server.ranks == RANKS
    assert all(image(ended[c].up) == image(Up(END[c], n)) for c, n in EXAMPLES.items())
    assert {c: trained.local.rank for c, trained in ended.items()} == RANKS  # a tail that was 0 cannot have shrunk


def test_each_client_is_sent_its_rank_and_one_that_was_never_heard_cuts_for_itself() -> None:
    algorithm, server, ended = one_round("private")
    own = {"head.weight": END["a"]["head.weight"]}
    close(algorithm.send(server, "a").weights, CUT)
    close(algorithm.model(ended["a"].local, algorithm.send(server, "a")), {**CUT, **own})
    close(algorithm.send(server, "c").weights, AVERAGE)
    small = algorithm.client_init(Stub(truncated(SEED, 1)))
    close(algorithm.model(small, algorithm.send(server, "c")), CUT)


@pytest.mark.parametrize(("corner", "rank"), [(3.0, 1), (4.0, 2)])
def test_a_rank_is_pruned_when_its_tail_has_shrunk(corner: float, rank: int) -> None:
    algorithm, server, ended = one_round("frozen", lam=2.0)
    end = {"layer.A": torch.diag(torch.tensor([1.0, corner])), "layer.B": torch.diag(torch.tensor([1.0, 4.0]))}
    problem, trained = turn(algorithm, Stub(SEED), ended["b"].local, algorithm.send(server, "b"), end)
    assert problem.penalty is not None
    assert float(problem.penalty(problem.weights)) == pytest.approx(2 * 13.5)
    assert float(problem.penalty(end)) == pytest.approx(2 * 4 * corner)
    assert trained.local.rank == rank
    expected = truncated(end, rank)
    close(trained.up.weights, expected)
    close({name: trained.model[name] for name in expected}, expected)
    assert algorithm.aggregate(server, Heard({"b": trained.up})).ranks == {"a": 1, "b": rank}


def test_without_pruning_nothing_is_penalised_or_cut() -> None:
    algorithm, server, ended = one_round("frozen", pruning=False)
    end = {name: END["b"][name] / 9 for name in AVERAGE}
    problem, trained = turn(algorithm, Stub(SEED), ended["b"].local, algorithm.send(server, "b"), end)
    assert problem.penalty is None
    assert trained.local.rank == 2


def test_what_nobody_who_was_heard_has_stays_as_it_was() -> None:
    algorithm = HetLoRA(head="frozen")
    up = Up({name: END["a"][name] for name in AVERAGE}, 3)
    server = algorithm.aggregate(algorithm.server_init(SEED, ()), Heard({"a": up}))
    expected = {"layer.A": [[0.0, 2.0], [1.0, -1.0]], "layer.B": [[3.0, 0.0], [4.0, 0.0]]}
    close(server.weights, {name: torch.tensor(rows) for name, rows in expected.items()})


def test_where_all_updates_are_0_clients_count_by_their_rows() -> None:
    algorithm = HetLoRA(head="frozen")
    ups = {
        client: Up({"layer.A": END[client]["layer.A"], "layer.B": 0 * END[client]["layer.B"]}, n)
        for client, n in EXAMPLES.items()
    }
    server = algorithm.aggregate(algorithm.server_init(SEED, ()), Heard(ups))
    close(server.weights, {"layer.A": torch.tensor([[1.5, 1.5], [0.0, 1.5]]), "layer.B": torch.zeros(2, 2)})
