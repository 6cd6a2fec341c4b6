"""Exact optimal transport: the cheapest way to move masses, min_T Σ_ij T_ij c_ij with T in Π(a, b).

A transport is solved by POT's network simplex, or, where one side has up to three atoms, as the best of all vertices of
its dual, thousands of problems at once. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celora.lazy import Lazy, Tensor, np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OPTIMAL = 1
pot = Lazy("ot.lp.emd_wrap")
ROUNDING = 1e-14
"""Of a problem's largest cost: a least cost below that is 0."""


def plan(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """A cheapest way to move masses `a` (n,) to masses `b` (m,) at `cost` (n, m): T (n, m), float64.

    T ≥ 0, rows sum to a, columns to b, and Σ T · cost is least.

    Raises:
        ValueError: if shapes disagree, a number is not finite, a mass is negative, or the totals differ.
    """
    a, b, cost = a.double(), b.double(), cost.double()
    if a.dim() != 1 or b.dim() != 1 or cost.shape != (len(a), len(b)) or not cost.numel():
        raise ValueError(
            "masses (n,) and (m,) need a cost of shape (n, m), none empty: "
            f"found {tuple(a.shape)}, {tuple(b.shape)} and {tuple(cost.shape)}"
        )
    if not all(t.isfinite().all() for t in (a, b, cost)) or (a < 0).any() or (b < 0).any():
        raise ValueError("masses are finite and not negative, costs are finite")
    total = float(a.sum())
    if total <= 0 or abs(total - float(b.sum())) > 1e-5 * total:
        raise ValueError(f"both sides must hold the same positive mass: found {total} and {float(b.sum())}")
    a, b = a / a.sum(), b / b.sum()
    scale = float(cost.abs().max())
    if min(cost.shape) == 1 or scale == 0:
        return total * torch.outer(a, b)
    moved, _ = _simplex(a.numpy(), b.numpy(), (cost / scale).numpy())
    return total * torch.from_numpy(moved).clamp(min=0)


def transport(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """The least cost, Σ T · cost over the cheapest `plan`; same arguments and errors."""
    return float((plan(a, b, cost) * cost.double()).sum())


def least_cost(a: NDArray[np.float64], b: NDArray[np.float64], cost: NDArray[np.float64]) -> float:
    """The least cost of one transport, a (n,), b (m,), cost (n, m): unchecked, where no cost is negative."""
    if len(a) == 1 or len(b) == 1:
        return float(a @ cost @ b)
    least = _simplex(a, b, np.ascontiguousarray(cost))[1]
    return least if least > ROUNDING * float(cost.max()) else 0.0


def least_costs(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """Least costs of many small transports: a (n, *R), b (m, *S), cost (n, m, *P), n ≤ 3; R, S broadcast to P.

    The dual is to maximise g(u) = Σ_i a_i u_i + Σ_j b_j min_i (c_ij − u_i). Any u gives a lower bound. g is
    concave, piecewise linear and, with u_1 = 0, constant along no line, so that its maximum is at a vertex: where two
    ties c_ij − u_i = c_kj − u_k meet. Those are m² + 2 m (m − 1) points at n = 3, and m at n = 2. An atom of mass 0
    adds points and changes no maximum, so what is padded needs no care.
    """
    n, m = cost.shape[:2]
    if n == 1 or m == 1:
        return (a[:, None] * b * cost).sum(dim=(0, 1))
    best = torch.full(cost.shape[2:], -torch.inf, dtype=cost.dtype)
    value, low = torch.empty_like(best), torch.empty_like(best)
    base = (b * cost[0]).sum(dim=0)  # with c_1j taken out, min_i (c_ij − u_i) is min(0, tie_ij − u_i)
    shares = [share.expand_as(best) for share in b]
    first = [[cost[1, j] - cost[0, j] for j in range(m)]]
    ties = first if n == 2 else [*first, [cost[2, j] - cost[0, j] for j in range(m)]]

    def at(*u: tuple[Tensor, Sequence[Tensor]]) -> None:
        """One point: for each row but the first u_i, and tie_ij − u_i in each column j."""
        torch.addcmul(base, a[1], u[0][0], out=value)
        if n == 3:
            value.addcmul_(a[2].expand_as(best), u[1][0])
        for j in range(m):
            over = u[0][1][j] if n == 2 else torch.minimum(u[0][1][j], u[1][1][j], out=low)
            value.addcmul_(torch.clamp(over, max=0.0, out=low), shares[j])
        torch.maximum(best, value, out=best)

    gaps = [[[tie[j] - tie[k] for j in range(m)] for k in range(m)] for tie in ties]  # [row][k][j]
    if n == 2:
        for k in range(m):
            at((ties[0][k], gaps[0][k]))
    else:
        for j in range(m):
            for k in range(m):
                one, two = (ties[0][j], gaps[0][j]), (ties[1][k], gaps[1][k])
                at(one, two)
                if j != k:  # rows 2 and 3 tie in column k, where u_3 − u_2 is tie_3k − tie_2k
                    at(one, (ties[1][k] - gaps[0][j][k], [gap + gaps[0][j][k] for gap in gaps[1][k]]))
                    at((ties[0][j] - gaps[1][k][j], [gap + gaps[1][k][j] for gap in gaps[0][j]]), two)
    return torch.where(best > ROUNDING * cost.abs().amax(dim=(0, 1)), best, 0.0)


def _simplex(a: Any, b: Any, cost: Any) -> tuple[NDArray[np.float64], float]:
    """POT's compiled solver, called without `ot.emd` around it, whose checks take half as long as a small problem."""
    moved, least, _, _, code = pot.emd_c(a, b, cost, 1_000_000, 1)
    if code != _OPTIMAL:
        raise RuntimeError(f"POT found no transport plan of shape {cost.shape}: its network simplex ended with {code}")
    return moved, float(least)
