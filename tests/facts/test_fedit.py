"""FedIT: what it sends, and that its average is not the average of the models (methods.md 7; part V, 2, 3 and 11)."""

import torch
from torch import Tensor

from celora.algorithms.fedit import FedIT, Up
from celora.core.aggregation import Heard
from tests.facts.payloads import HEAD, rounds
from tests.toy import D_IN, D_OUT, RANK

N = (3, 1, 6)


def factors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "layer.A": torch.randn(RANK, D_IN, generator=draw, dtype=torch.float64),
        "layer.B": torch.randn(D_OUT, RANK, generator=draw, dtype=torch.float64),
    }


def average(*clients: dict[str, Tensor]) -> dict[str, Tensor]:
    algorithm = FedIT()
    ups = {str(i): Up(weights, n) for i, (weights, n) in enumerate(zip(clients, N, strict=True))}
    return dict(algorithm.send(algorithm.aggregate(algorithm.server_init({}, ()), Heard(ups)), "0").weights)


def update(weights: dict[str, Tensor]) -> Tensor:
    return weights["layer.B"] @ weights["layer.A"]


def test_both_factors_and_the_head_travel_both_ways() -> None:
    """12 matrices at r = 8 and d = 384: 12·8·(384 + 384)·4 = 294,912 bytes."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FedIT()))
    size = 12 * 8 * (384 + 384) * 4
    assert size == 294_912
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload) == (size, size)
    assert (closing.up_payload, closing.down_payload) == (0, size)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_a_private_head_does_not_travel() -> None:
    traffic = rounds(FedIT(head="private"))[1].traffic["a"]
    assert (traffic.head_up, traffic.head_down, traffic.up_payload) == (0, 0, 294_912)


def test_the_average_of_the_factors_is_not_the_average_of_the_updates() -> None:
    clients = [factors(seed) for seed in range(3)]
    exact = sum(n / sum(N) * update(c) for n, c in zip(N, clients, strict=True))
    assert float((update(average(*clients)) - exact).norm() / exact.norm()) > 0.1  # type: ignore[union-attr,arg-type]


def test_it_is_where_all_clients_agree() -> None:
    one = factors(0)
    torch.testing.assert_close(update(average(one, one, one)), update(one))


def test_the_average_depends_on_how_a_client_represents_its_update() -> None:
    """(B M⁻¹)(M A) is the same model for every invertible M."""
    one, *others = (factors(seed) for seed in range(3))
    m = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    same = {"layer.A": m @ one["layer.A"], "layer.B": one["layer.B"] @ torch.linalg.inv(m)}
    torch.testing.assert_close(update(same), update(one))
    assert float((update(average(same, *others)) - update(average(one, *others))).norm()) > 0.1
