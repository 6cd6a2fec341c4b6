"""celora.core.adapters: for every family, many clients in one pass are each client's own pass, and `lora` is Δ."""

import pytest
import torch
from torch import Tensor

from celora.core.adapters import (
    Dual,
    Family,
    FixedBases,
    Gated,
    Heads,
    Lora,
    Pair,
    Residual,
    Tri,
)

FAMILIES = [Lora(), Tri(), FixedBases(), Heads(3), Residual(), Dual(2), Gated(), Pair()]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
D_IN, D_OUT, RANK, K = 7, 5, 2, 3


def weights(family: Family, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(of.rows, of.columns, generator=draw, dtype=torch.float64)
        for name, of in family.parts(RANK, D_IN, D_OUT).items()
    }


def inputs() -> Tensor:
    return torch.randn(2 * K, 4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@every_family
def test_a_pass_of_many_clients_is_each_clients_own(family: Family) -> None:
    """Whichever of the parts have a client axis: all, or any one of them, or all but one."""
    x, clients = inputs(), [weights(family, seed) for seed in range(K)]
    parts = list(clients[0])
    one, but_one = [{name} for name in parts], [{*parts} - {name} for name in parts]
    for own in ({*parts}, *one, *but_one):
        mixed = [{n: c[n] if n in own else clients[0][n] for n in parts} for c in clients]
        together = {n: torch.stack([c[n] for c in clients]) if n in own else clients[0][n] for n in parts}
        alone = torch.cat([family.delta(rows, w) for rows, w in zip(x.chunk(K), mixed, strict=True)])
        torch.testing.assert_close(family.delta(x, together), alone)


@every_family
def test_its_lora_adds_the_same(family: Family) -> None:
    x, w = inputs(), weights(family)
    pair = family.lora(w)
    if pair is None:
        doubled = family.delta(2 * x, w) - 2 * family.delta(x, w)
        assert float(doubled.norm()) > 0.1  # it is not linear, so there is none
    else:
        a, b = pair
        torch.testing.assert_close(x @ a.T @ b.T, family.delta(x, w))


def test_pair_is_the_gated_sum_of_the_clients_own_and_the_others_adapter() -> None:
    """(1 − b) B (P A x + Q) + b B (P2 A x + Q2), b = sigmoid(ln 3) = 3/4."""
    x, w = inputs(), {**weights(Pair()), "G": torch.tensor([[3.0]], dtype=torch.float64).log()}
    own, others = ((x @ w["A"].T @ w[p].T + w[q]) @ w["B"].T for p, q in (("P", "Q"), ("P2", "Q2")))
    torch.testing.assert_close(Pair().delta(x, w), own / 4 + 3 * others / 4)


def test_heads_are_a_sum_over_heads() -> None:
    x, w, family = inputs(), weights(Heads(3)), Heads(3)
    terms = [
        w[f"S{h}"] * (x @ a.T @ w[f"C{h}"].T @ b.T)
        for h, a, b in zip((1, 2, 3), w["A"].chunk(3), w["B"].chunk(3, dim=1), strict=True)
    ]
    torch.testing.assert_close(family.delta(x, w), sum(terms))
