"""CE-LoRA, one round, three clients, by hand (r = 2, one layer).

    seed       A = [[1 0] [0 1]]   B = 0   C = I
    ends       C_a = [[2 0] [0 1]]         C_b = [[1 0] [0 4]]          C_c = [[3 2] [5 6]]
    moved      C_a - I = [[1 0] [0 0]]     C_b - I = [[0 0] [0 3]]      C_c - I = [[2 2] [5 5]]

Model similarity. Examples are the columns of C - I. With two examples, centred, the Gram matrix is a multiple of
[[1 -1] [-1 1]], so CKA is 1 for every pair whose columns differ; c's columns are equal, so c has no variance: it is
alike (1) to itself and unlike (0) the others.

    S_model = [[1 1 0] [1 1 0] [0 0 1]]

Data similarity. Each client tells one component of spread 1 for one class; means 0, 1, 3 on a line; no label cost. So
d = 1 (a, b), 3 (a, c), 2 (b, c), the median is 2, and 1 / (1 + d/2) is

    S_data  = [[1 2/3 2/5] [2/3 1 1/2] [2/5 1/2 1]]

Half and half:   S = [[1 5/6 1/5] [5/6 1 1/4] [1/5 1/4 1]], with row sums 61/30, 25/12, 29/20. Divided by them:

    W = [[30/61 25/61 6/61] [10/25 12/25 3/25] [4/29 5/29 20/29]]

Self excluded, W_a = [0 25/31 6/31], and the same for the others. Fixed at 1/4: the others share 3/4 in that ratio.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.ce_lora import CELoRA, Local, Server, Up
from celora.core.aggregation import Heard
from celora.maths.mixtures import Mixture
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.eye(2),
    "layer.B": torch.zeros(2, 2),
    "layer.C": torch.eye(2),
    "head.weight": torch.zeros(1, 2),
}
CORES = {
    "a": torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
    "b": torch.tensor([[1.0, 0.0], [0.0, 4.0]]),
    "c": torch.tensor([[3.0, 2.0], [5.0, 6.0]]),
}
MEANS = {"a": 0.0, "b": 1.0, "c": 3.0}
ROWS = {"a": 1, "b": 2, "c": 3}
BY_HAND: dict[str, Any] = {"kernel": "inverse", "label_cost": 0.0, "data_share": 0.5, "self_weight": "natural"}
W = torch.tensor([[30 / 61, 25 / 61, 6 / 61], [10 / 25, 12 / 25, 3 / 25], [4 / 29, 5 / 29, 20 / 29]])


def mixture(mean: float) -> Mixture:
    one = torch.ones(1, 1)
    return Mixture(torch.zeros(1, dtype=torch.int32), torch.ones(1), mean * one, one)


def up(client: str, summary: bool = True) -> Up:
    return Up({"layer.C": CORES[client]}, ROWS[client], mixture(MEANS[client]) if summary else None)


def served(clients: str = "abc", **fields: Any) -> tuple[CELoRA, Server]:
    """The server after one round in which these clients were heard."""
    algorithm = CELoRA(**{**BY_HAND, **fields})
    return algorithm, algorithm.aggregate(algorithm.server_init(SEED, ()), Heard({c: up(c) for c in clients}))


def received(algorithm: CELoRA, server: Server, clients: str = "abc") -> list[Tensor]:
    return [algorithm.send(server, client).core["layer.C"] for client in clients]


def mixed(weights: Tensor, clients: str = "abc") -> list[Tensor]:
    return [sum(w * CORES[c] for w, c in zip(row, clients, strict=True)) for row in weights.float()]  # type: ignore[misc]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, check_dtype=False)


def test_each_client_receives_the_average_of_its_own_row_of_w() -> None:
    """C̄_a = (30 C_a + 25 C_b + 6 C_c) / 61 = [[103 12] [30 166]] / 61."""
    algorithm, server = served()
    assert server.mixing.clients == ("a", "b", "c")
    close(server.mixing.weights, W)
    close(received(algorithm, server), mixed(W))
    close(received(algorithm, server, "a")[0], torch.tensor([[103.0, 12.0], [30.0, 166.0]]) / 61)


def test_an_excluded_self_leaves_the_others_in_their_ratio() -> None:
    weights = torch.tensor([[0, 25 / 31, 6 / 31], [10 / 13, 0, 3 / 13], [4 / 9, 5 / 9, 0]])
    algorithm, server = served(self_weight="excluded")
    close(server.mixing.weights, weights)
    close(received(algorithm, server), mixed(weights))


def test_a_fixed_self_takes_its_share_and_the_others_the_rest_in_their_ratio() -> None:
    others = torch.tensor([[0, 25 / 31, 6 / 31], [10 / 13, 0, 3 / 13], [4 / 9, 5 / 9, 0]])
    _, server = served(self_weight="fixed", self_share=0.25)
    close(server.mixing.weights, 0.25 * torch.eye(3) + 0.75 * others)


def test_by_rows_multiplies_each_column_by_its_clients_rows() -> None:
    """n = 1, 2, 3: row a is (30, 50, 18) / 98."""
    _, server = served(by_rows=True)
    close(server.mixing.weights[0], torch.tensor([30 / 98, 50 / 98, 18 / 98]))


def test_the_data_alone_and_the_models_alone() -> None:
    """λ = 1: row a is (15, 10, 6) / 31. λ = 0: a and b share by halves, c keeps its own."""
    close(served(data_share=1.0)[1].mixing.weights[0], torch.tensor([15 / 31, 10 / 31, 6 / 31]))
    close(served(data_share=0.0)[1].mixing.weights, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))


def test_raw_cores_are_compared_where_c_is_asked_for() -> None:
    """C_c's own columns differ, so that all three score 1; λ = 0 then gives the plain mean."""
    close(served(data_share=0.0, cka_of="C")[1].mixing.weights, torch.full((3, 3), 1 / 3))


def test_the_uniform_control_sends_everybody_the_plain_mean() -> None:
    """[[6 2] [5 11]] / 3."""
    algorithm, server = served(rule="uniform")
    close(received(algorithm, server), [torch.tensor([[6.0, 2.0], [5.0, 11.0]]) / 3] * 3)


def test_the_reset_control_sends_the_identity() -> None:
    algorithm, server = served(rule="reset")
    assert [core.tolist() for core in received(algorithm, server)] == [[[1.0, 0.0], [0.0, 1.0]]] * 3


def test_the_permuted_control_sends_each_core_whole_to_exactly_one_client_and_anew_each_round() -> None:
    algorithm, server = served(rule="permuted")
    orders = []
    for _ in range(8):
        cores = [core.tolist() for core in received(algorithm, server)]
        orders.append(tuple("abc"[[c.tolist() for c in CORES.values()].index(core)] for core in cores))
        server = algorithm.aggregate(server, Heard({c: up(c, summary=False) for c in "abc"}))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1


def test_a_client_that_is_alone_gets_its_own_core_back() -> None:
    for self_weight in ("natural", "excluded", "fixed"):
        algorithm, server = served("b", self_weight=self_weight)
        assert torch.equal(received(algorithm, server, "b")[0], CORES["b"])


def test_a_client_without_a_summary_is_placed_by_its_model_alone_and_asked_again() -> None:
    """S_ac = 0 and S_bc = 0 (models), S_ab = (2/3·½ + ½) with d/median = 1: kernel 1/2, so S_ab = 3/4."""
    algorithm = CELoRA(**BY_HAND)
    server = algorithm.aggregate(
        algorithm.server_init(SEED, ()), Heard({"a": up("a"), "b": up("b"), "c": up("c", False)})
    )
    close(server.mixing.weights, torch.tensor([[4 / 7, 3 / 7, 0], [3 / 7, 4 / 7, 0], [0, 0, 1]]))
    assert [algorithm.send(server, client).introduce for client in "abcd"] == [False, False, True, True]
    server = algorithm.aggregate(server, Heard({"c": up("c")}))
    close(server.mixing.weights, W)
    assert not algorithm.send(server, "c").introduce


def test_a_client_that_is_away_counts_with_its_last_core_and_receives_anew() -> None:
    algorithm, server = served()
    before = received(algorithm, server, "c")[0]
    moved = algorithm.aggregate(server, Heard({c: up(c, summary=False) for c in "ab"}))
    close(moved.mixing.weights, W)
    moved = algorithm.aggregate(server, Heard({"a": Up({"layer.C": 10 * torch.eye(2)}, 1, None)}))
    assert not torch.equal(received(algorithm, moved, "c")[0], before)
    assert torch.equal(moved.cores["c"]["layer.C"], CORES["c"])


def test_a_and_b_and_the_head_stay_and_c_is_sent_with_n() -> None:
    algorithm, learner = CELoRA(data_share=0.0), Stub(SEED, 7)
    end = {name: tensor + 1 for name, tensor in SEED.items()}
    down = algorithm.send(algorithm.server_init(SEED, ()), "a")
    problem, trained = turn(algorithm, learner, algorithm.client_init(learner), down, end)
    assert all(map(problem.train, SEED))
    assert image(trained.up) == image(Up({"layer.C": end["layer.C"]}, 7, None))
    kept = {"layer.A": end["layer.A"], "layer.B": end["layer.B"], "head.weight": end["head.weight"]}
    assert image(trained.local) == image(Local(kept))


def test_training_starts_from_the_received_core_between_the_own_bases() -> None:
    algorithm, server = served()
    mine = {"layer.A": 2 * torch.eye(2), "layer.B": 3 * torch.eye(2), "head.weight": torch.ones(1, 2)}
    problem, _ = turn(algorithm, Stub(SEED), Local(mine), algorithm.send(server, "a"), {})
    close(problem.weights, {**mine, "layer.C": mixed(W)[0]})


def test_a_shared_head_is_averaged_by_the_same_row_of_w() -> None:
    algorithm = CELoRA(head="shared", **BY_HAND)
    heads = {"a": 1.0, "b": 2.0, "c": 3.0}
    ups = {
        c: Up({"layer.C": CORES[c], "head.weight": torch.full((1, 2), h)}, 1, mixture(MEANS[c]))
        for c, h in heads.items()
    }
    server = algorithm.aggregate(algorithm.server_init(SEED, ()), Heard(ups))
    found = [float(algorithm.send(server, c).core["head.weight"][0, 0]) for c in "abc"]
    assert found == pytest.approx([(30 + 50 + 18) / 61, (10 + 24 + 9) / 25, (4 + 10 + 60) / 29], abs=1e-6)


def test_frozen_bases_need_a_b_that_is_not_zero() -> None:
    algorithm = CELoRA(freeze_bases=True, data_share=0.0)
    down = algorithm.send(algorithm.server_init(SEED, ()), "a")
    with pytest.raises(ValueError, match=r"B is 0.*adapter.init = 'orthonormal'"):
        turn(algorithm, Stub(SEED), Local({}), down, {})
    seed = {**SEED, "layer.B": torch.eye(2)}
    problem, trained = turn(algorithm, Stub(seed), Local({}), down, {})
    assert [name for name in seed if problem.train(name)] == ["layer.C", "head.weight"]
    assert list(trained.local.mine) == ["head.weight"]
