"""FedEx-LoRA: exact with the residual, off by what is cut off it without (methods.md 13; part V, 1, 2 and 11)."""

import pytest
import torch
from torch import Tensor

from celora.algorithms.fedex_lora import FedExLoRA, Up
from celora.core.aggregation import Heard
from celora.core.client_state import KeptModel, unpacked
from celora.core.messages import Plan
from tests.facts.payloads import HEAD, rounds
from tests.toy import Federation, Stub, lost

D_IN, D_OUT, RANK, N = 12, 10, 3, (3, 1, 6)
SIZE = 12 * 8 * (384 + 384) * 4


def drawn(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(RANK, D_IN, generator=draw, dtype=torch.float64)
    return {"layer.A": a, "layer.B": torch.randn(D_OUT, RANK, generator=draw, dtype=torch.float64)}


CLIENTS = [drawn(seed) for seed in range(3)]
UPS = {str(i): Up(w, n) for i, (w, n) in enumerate(zip(CLIENTS, N, strict=True))}
EXACT = torch.stack([n / sum(N) * w["layer.B"] @ w["layer.A"] for n, w in zip(N, CLIENTS, strict=True)]).sum(0)


def served(algorithm: FedExLoRA, server: object) -> Tensor:
    """(B A + W) of a client that has seen nothing but this download."""
    w = algorithm.model(algorithm.client_init(Stub({})), algorithm.send(server, "new"))
    return w["layer.B"] @ w["layer.A"] + w["layer.W"]


def test_down_go_the_averages_and_a_residual_as_large_as_all_that_went_up() -> None:
    for clients in ("ab", "abcd"):
        first, second, closing = (rnd.traffic["a"] for rnd in rounds(FedExLoRA(), clients))
        assert (first.up_payload, first.down_payload) == (SIZE, 0)
        assert (second.up_payload, second.down_payload) == (SIZE, (1 + len(clients)) * SIZE)
        assert (closing.up_payload, closing.down_payload) == (0, (1 + len(clients)) * SIZE)
        assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_a_residual_of_rank_4_costs_half_of_what_fedit_sends_however_many_clients() -> None:
    for clients in ("ab", "abcd"):
        assert rounds(FedExLoRA(rank=4), clients)[1].traffic["a"].down_payload == SIZE + SIZE // 2


def test_the_update_served_is_what_was_merged_before_and_the_mean_of_the_updates_made() -> None:
    algorithm = FedExLoRA(head="frozen")
    first = algorithm.aggregate(algorithm.server_init({}, ()), Heard(UPS))
    assert float((served(algorithm, first) - EXACT).norm() / EXACT.norm()) < 1e-14
    before = first.base.merged.total["layer.W"]
    second = algorithm.aggregate(first, Heard(UPS))
    assert float((served(algorithm, second) - before - EXACT).norm() / EXACT.norm()) < 1e-14
    assert float(before.norm()) > 0.1 * float(EXACT.norm())


def test_fedits_average_is_off_by_the_residual() -> None:
    algorithm = FedExLoRA(head="frozen")
    server = algorithm.aggregate(algorithm.server_init({}, ()), Heard(UPS))
    fedit = server.weights["layer.B"] @ server.weights["layer.A"]
    torch.testing.assert_close(EXACT - fedit, server.base.merged.total["layer.W"])


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 20])
def test_a_cut_residual_is_off_by_its_discarded_singular_values_and_by_no_more(rank: int) -> None:
    """R of three clients of rank 3 has rank 6: the differences from a mean sum to 0."""
    algorithm = FedExLoRA(head="frozen", rank=rank)
    server = algorithm.aggregate(algorithm.server_init({}, ()), Heard(UPS))
    fedit = server.weights["layer.B"] @ server.weights["layer.A"]
    values = torch.linalg.svdvals(EXACT - fedit)
    assert int((values > 1e-12).sum()) == 6
    error = float((served(algorithm, server) - EXACT).norm())
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-9, abs=1e-12)
    assert (error > 1e-3) == (rank < 6)


def test_where_all_clients_agree_there_is_no_residual() -> None:
    algorithm = FedExLoRA(head="frozen")
    alike = {client: Up(CLIENTS[0], n) for client, n in zip("abc", N, strict=True)}
    server = algorithm.aggregate(algorithm.server_init({}, ()), Heard(alike))
    assert float(server.base.merged.total["layer.W"].norm()) < 1e-13


@pytest.mark.parametrize("rank", [None, 2])
def test_all_clients_have_the_same_weights_to_the_bit_whoever_missed_what(rank: int | None) -> None:
    """Also with a cut residual: what is cut off is lost to all alike."""
    federation = Federation(FedExLoRA(rank=rank))
    for rnd in federation.run(Plan(rounds=4), lost(("c1", 1), ("c1", 2), ("c2", 3))):
        models = [
            unpacked(KeptModel, store[name], federation.schema).weights
            for store in federation.stores.values()
            if (name := f"received@{rnd.index - 1}") in store
        ]
        assert len(models) >= 3
        assert all(torch.equal(w, models[0][name]) for model in models[1:] for name, w in model.items())
