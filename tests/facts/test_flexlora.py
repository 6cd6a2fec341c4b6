"""FlexLoRA: FedIT's bytes at each client's rank, exact where ranks allow it and nearest where not (methods.md 11;
part V, 2 and 11)."""

import pytest
import torch
from torch import Tensor

from celora.algorithms.flexlora import FlexLoRA, Up
from celora.core.adapters import Lora, truncated
from celora.core.aggregation import Heard
from celora.core.messages import Plan
from celora.core.rounds import run_rounds
from celora.engines.embedded import Embedded
from celora.wire import Schema
from tests.facts.payloads import HEAD, rounds, weights
from tests.toy import Stub, pretend

D_IN, D_OUT, N, RANKS = 12, 10, (3, 1, 6), (2, 3, 4)


def drawn(rank: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, D_IN, generator=draw, dtype=torch.float64)
    return {"layer.A": a, "layer.B": torch.randn(D_OUT, rank, generator=draw, dtype=torch.float64)}


CLIENTS = [drawn(rank, seed) for seed, rank in enumerate(RANKS)]


def update(w: dict[str, Tensor]) -> Tensor:
    return w["layer.B"] @ w["layer.A"]


EXACT = torch.stack([n / sum(N) * update(w) for n, w in zip(N, CLIENTS, strict=True)]).sum(0)


def served(largest: int) -> tuple[FlexLoRA, object]:
    algorithm = FlexLoRA(head="frozen")
    ups = {str(i): Up(w, n) for i, (w, n) in enumerate(zip(CLIENTS, N, strict=True))}
    return algorithm, algorithm.aggregate(algorithm.server_init(drawn(largest, 9), ()), Heard(ups))


def test_both_factors_and_the_head_travel_both_ways() -> None:
    """12·8·(384 + 384)·4 = 294,912 bytes, as FedIT's."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FlexLoRA()))
    size = 294_912
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload) == (size, size)
    assert (closing.up_payload, closing.down_payload) == (0, size)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_a_client_of_rank_2_pays_for_rank_2() -> None:
    """12·2·(384 + 384)·4 = 73,728 bytes, both ways, but for the first download: nobody has told its rank yet."""
    algorithm, initial = FlexLoRA(), weights(Lora())

    def population(client: str, round: int) -> Stub:
        return Stub(truncated(initial, 2 if client == "a" else 8), 40)

    engine = Embedded(algorithm, population, {}, Schema.of(initial), pretend)
    traffic = [rnd.traffic for rnd in run_rounds(algorithm, engine, Plan(rounds=2), "ab", initial)]
    assert [t["a"].up_payload for t in traffic] == [73_728, 73_728, 0]
    assert [t["a"].down_payload for t in traffic] == [0, 73_728, 73_728]
    assert [t["b"].down_payload for t in traffic] == [0, 294_912, 294_912]


@pytest.mark.parametrize("largest", [sum(RANKS), sum(RANKS) + 1])
def test_the_update_served_is_the_mean_of_the_updates_where_the_rank_reaches_their_sum(largest: int) -> None:
    algorithm, server = served(largest)
    found = algorithm.send(server, "new").weights
    assert float((update(found) - EXACT).norm() / EXACT.norm()) < 1e-14
    assert found["layer.A"].shape == (largest, D_IN)


@pytest.mark.parametrize("rank", range(1, 9))
def test_below_it_is_off_by_the_singular_values_that_are_left_out_and_by_no_more(rank: int) -> None:
    """Eckart and Young: no other A and B of this rank are nearer."""
    algorithm, server = served(8)
    values = torch.linalg.svdvals(EXACT)
    local = algorithm.client_init(Stub(drawn(rank, 9)))
    found = algorithm.model(local, algorithm.send(server, "new"))
    assert found["layer.B"].shape == (D_OUT, rank)
    assert float((update(found) - EXACT).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-9)


def test_a_heard_client_is_sent_its_own_rank() -> None:
    algorithm, server = served(8)
    for client, rank in enumerate(RANKS):
        found = algorithm.send(server, str(client)).weights
        assert (found["layer.A"].shape, found["layer.B"].shape) == ((rank, D_IN), (D_OUT, rank))


def test_how_a_client_represents_its_update_does_not_matter() -> None:
    """(B M⁻¹)(M A) is the same model for every invertible M, and gives the same average: FedIT's is another."""
    m = torch.randn(2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    same = {"layer.A": m @ CLIENTS[0]["layer.A"], "layer.B": CLIENTS[0]["layer.B"] @ torch.linalg.inv(m)}
    algorithm, server = served(4)
    ups = {str(i): Up(w, n) for i, (w, n) in enumerate(zip([same, *CLIENTS[1:]], N, strict=True))}
    other = algorithm.aggregate(algorithm.server_init(drawn(4, 9), ()), Heard(ups))
    torch.testing.assert_close(
        update(algorithm.send(other, "new").weights), update(algorithm.send(server, "new").weights)
    )


def test_the_server_makes_no_matrix_of_a_module() -> None:
    """Of 20,000 × 20,000 numbers a dense update would take 3.2 GB; the factors' QR takes milliseconds."""
    wide = 20_000
    draw = torch.Generator().manual_seed(0)
    big = {"layer.A": torch.randn(2, wide, generator=draw), "layer.B": torch.randn(wide, 2, generator=draw)}
    algorithm = FlexLoRA(head="frozen")
    server = algorithm.aggregate(algorithm.server_init(big, ()), Heard({"a": Up(big, 1), "b": Up(big, 3)}))
    found = algorithm.send(server, "a").weights
    x = torch.randn(wide, 3, generator=draw)
    expected = big["layer.B"] @ (big["layer.A"] @ x)
    torch.testing.assert_close(found["layer.B"] @ (found["layer.A"] @ x), expected, atol=1e-2, rtol=1e-4)
