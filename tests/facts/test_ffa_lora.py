"""FFA-LoRA: half of FedIT's bytes, and an exact average (methods.md 8; part V, 2 and 11)."""

import torch

from celora.algorithms.ffa_lora import FFALoRA, Up
from celora.core.aggregation import Heard
from tests.facts.payloads import HEAD, rounds
from tests.toy import D_IN, D_OUT, RANK, Federation

N = (3, 1, 6)


def test_b_and_the_head_travel_and_a_never_does() -> None:
    """12·8·384·4 = 147,456 bytes, half of FedIT's."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FFALoRA()))
    size = 12 * 8 * 384 * 4
    assert 2 * size == 294_912
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload) == (size, size)
    assert (closing.up_payload, closing.down_payload) == (0, size)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_the_update_served_is_the_mean_of_the_updates_made() -> None:
    """‖B̄ A⁰ − Σ p_i B_i A⁰‖ = 0, to rounding, for B_i that have nothing to do with each other."""
    draw, algorithm = torch.Generator().manual_seed(0), FFALoRA()
    a = torch.randn(RANK, D_IN, generator=draw, dtype=torch.float64)
    b = [torch.randn(D_OUT, RANK, generator=draw, dtype=torch.float64) for _ in N]
    ups = {str(i): Up({"layer.B": b[i]}, n) for i, n in enumerate(N)}
    served = algorithm.send(algorithm.aggregate(algorithm.server_init({}, ()), Heard(ups)), "0").weights["layer.B"] @ a
    exact = torch.stack([n / sum(N) * b[i] @ a for i, n in enumerate(N)]).sum(0)
    assert float((served - exact).norm() / exact.norm()) < 1e-14


def test_after_training_every_client_still_has_the_seeds_a() -> None:
    from celora.core.client_state import KeptModel, unpacked
    from celora.core.messages import Plan

    federation = Federation(FFALoRA())
    list(federation.run(Plan(rounds=2)))
    for store in federation.stores.values():
        weights = unpacked(KeptModel, store["personal@2"], federation.schema).weights
        assert torch.equal(weights["layer.A"], federation.population.initial["layer.A"])
        assert bool(weights["layer.B"].any())
