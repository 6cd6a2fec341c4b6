"""HetLoRA: what it sends, whose say is how large, and ranks that only go down (methods.md 10; part V, 2 and 11)."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from celora.algorithms.hetlora import Down, HetLoRA, Local, Up
from celora.core.adapters import Lora, truncated
from celora.core.aggregation import Heard
from celora.core.messages import Plan
from celora.core.rounds import run_rounds
from celora.engines.embedded import Embedded
from celora.wire import Schema
from tests.facts.payloads import HEAD, rounds, weights
from tests.toy import Federation, Stub, pretend

D_IN, D_OUT, N, RANKS = 12, 10, (3, 1, 6), (2, 3, 4)


def drawn(rank: int, seed: int, size: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module in ("one", "two"):
        found[f"{module}.A"] = torch.randn(rank, D_IN, generator=draw, dtype=torch.float64)
        found[f"{module}.B"] = size * torch.randn(D_OUT, rank, generator=draw, dtype=torch.float64)
    return found


CLIENTS = [drawn(rank, seed, size) for seed, (rank, size) in enumerate(zip(RANKS, (1.0, 3.0, 0.5), strict=True))]


def served(**fields: object) -> dict[str, Tensor]:
    algorithm = HetLoRA(head="frozen", **fields)
    ups = {str(i): Up(w, n) for i, (w, n) in enumerate(zip(CLIENTS, N, strict=True))}
    return dict(algorithm.aggregate(algorithm.server_init(drawn(4, 9), ()), Heard(ups)).weights)


def update(w: dict[str, Tensor], module: str = "one") -> Tensor:
    return w[f"{module}.B"] @ w[f"{module}.A"]


def pad(w: Tensor, rows: int, columns: int) -> Tensor:
    out = torch.zeros(rows, columns, dtype=w.dtype)
    out[: w.shape[0], : w.shape[1]] = w
    return out


def test_both_factors_and_the_head_travel_both_ways() -> None:
    """12·8·(384 + 384)·4 = 294,912 bytes, as FedIT's."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(HetLoRA()))
    size = 294_912
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload) == (size, size)
    assert (closing.up_payload, closing.down_payload) == (0, size)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_a_client_of_rank_2_pays_for_rank_2() -> None:
    algorithm, initial = HetLoRA(), weights(Lora())

    def population(client: str, round: int) -> Stub:
        return Stub(truncated(initial, 2 if client == "a" else 8), 40)

    engine = Embedded(algorithm, population, {}, Schema.of(initial), pretend)
    traffic = [rnd.traffic for rnd in run_rounds(algorithm, engine, Plan(rounds=2), "ab", initial)]
    assert [t["a"].up_payload for t in traffic] == [73_728, 73_728, 0]
    assert [t["a"].down_payload for t in traffic] == [0, 73_728, 73_728]
    assert [t["b"].down_payload for t in traffic] == [0, 294_912, 294_912]


@pytest.mark.parametrize("weighting", ["module", "all"])
def test_each_module_is_averaged_by_the_norms_of_its_own_updates_or_of_all(weighting: str) -> None:
    found = served(weighting=weighting)
    for module in ("one", "two"):
        norms = [
            update(w, module).norm()
            if weighting == "module"
            else torch.cat([update(w, m).flatten() for m in ("one", "two")]).norm()
            for w in CLIENTS
        ]
        p = torch.stack(norms) / sum(norms)
        a = torch.stack([p[i] * pad(w[f"{module}.A"], 4, D_IN) for i, w in enumerate(CLIENTS)]).sum(0)
        b = torch.stack([p[i] * pad(w[f"{module}.B"], D_OUT, 4) for i, w in enumerate(CLIENTS)]).sum(0)
        torch.testing.assert_close(found[f"{module}.A"], a)
        torch.testing.assert_close(found[f"{module}.B"], b)


def test_the_average_of_the_factors_is_not_the_average_of_the_updates() -> None:
    norms = torch.stack([update(w).norm() for w in CLIENTS])
    exact = torch.stack([p * update(w) for p, w in zip(norms / norms.sum(), CLIENTS, strict=True)]).sum(0)
    assert float((update(served()) - exact).norm() / exact.norm()) > 0.1


def test_no_training_leaves_a_row_that_is_0_in_both_factors() -> None:
    """Why rows that nobody has are not averaged: their gradients are products with each other."""
    a, b = torch.zeros(1, 3, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    (b @ a @ torch.ones(3)).sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


def test_the_penalty_has_a_gradient_at_the_start_where_b_is_0() -> None:
    w = {name: t.clone().requires_grad_(True) for name, t in drawn(4, 0, size=0.0).items()}
    HetLoRA().penalty(w).backward()
    assert all(bool(t.grad.isfinite().all()) for t in w.values())


def test_ranks_only_go_down_to_the_smallest_and_bytes_with_them() -> None:
    federation = Federation(HetLoRA(lam=0.3, gamma=0.5, smallest=2))
    found = list(federation.run(Plan(rounds=4)))
    ranks = [rnd.server.ranks for rnd in found[:-1]]
    assert set(ranks[0].values()) == {4}
    assert set(ranks[-1].values()) == {2}
    for earlier, later in pairwise(ranks):
        assert all(later[client] <= earlier[client] for client in later)
    first, last = found[0].traffic["c0"].up_payload, found[-2].traffic["c0"].up_payload
    assert last * 2 == first
    assert {client: federation.private(store).rank for client, store in federation.stores.items()} == ranks[-1]


def test_a_client_that_pruned_unheard_cuts_what_it_is_sent() -> None:
    algorithm, sent = HetLoRA(), drawn(4, 0)
    model = algorithm.model(Local(3, {}), Down(sent))
    assert torch.equal(model["one.A"], sent["one.A"][:3])
    assert torch.equal(model["two.B"], sent["two.B"][:, :3])
