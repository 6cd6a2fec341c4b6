"""FedSA-LoRA: only A travels, and what it gives a client is not the average model (methods.md 9; part V, 2, 3, 11)."""

import torch
from torch import Tensor

from celora.algorithms.fedsa_lora import FedSALoRA, Local, Up
from celora.core.aggregation import Heard
from tests.facts.payloads import rounds
from tests.toy import D_IN, D_OUT, RANK

N = (3, 1, 6)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = [drawn(RANK, D_IN, seed=i) for i in range(3)]
B = [drawn(D_OUT, RANK, seed=10 + i) for i in range(3)]


def received(a: list[Tensor], client: int = 0) -> Tensor:
    """The update that a client predicts with after download."""
    algorithm = FedSALoRA()
    ups = {str(i): Up({"layer.A": a[i]}, n) for i, n in enumerate(N)}
    down = algorithm.send(algorithm.aggregate(algorithm.server_init({}, ()), Heard(ups)), str(client))
    weights = algorithm.model(Local({"layer.B": B[client]}), down)
    return weights["layer.B"] @ weights["layer.A"]


def test_a_travels_both_ways_and_b_and_the_head_stay() -> None:
    """12·8·384·4 = 147,456 bytes."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FedSALoRA()))
    size = 12 * 8 * 384 * 4
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload) == (size, size)
    assert (closing.up_payload, closing.down_payload) == (0, size)
    assert {t.head_up for t in (first, second, closing)} | {t.head_down for t in (first, second, closing)} == {0}


def test_what_clients_receive_is_on_average_not_the_average_update() -> None:
    exact = sum(n / sum(N) * B[i] @ A[i] for i, n in enumerate(N))
    found = sum(n / sum(N) * received(A, i) for i, n in enumerate(N))
    assert float((found - exact).norm() / exact.norm()) > 0.1  # type: ignore[union-attr,arg-type]


def test_the_average_depends_on_how_another_client_represents_its_update() -> None:
    """(B M⁻¹)(M A) is the same model for every invertible M; its A is not."""
    m = drawn(RANK, RANK, seed=20)
    torch.testing.assert_close((B[1] @ torch.linalg.inv(m)) @ (m @ A[1]), B[1] @ A[1])
    assert float((received([A[0], m @ A[1], A[2]]) - received(A)).norm()) > 0.1
