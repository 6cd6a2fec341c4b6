"""How far apart two clients' data lie: exact optimal transport between class-conditional Gaussian mixtures.

    w2²((μ,σ), (ν,τ)) = ‖μ − ν‖² + ‖σ − τ‖²                     2-Wasserstein, diagonal Gaussians
    D²(c, c') = min_T Σ_gh T_gh w2²(g, h)                       T in Π(π_c, π_c'); MW2
    d²(p, q)  = min_T Σ T_cg,c'g' [w2²(g, g') + λ D²(c, c')]    T in Π(p, q), atoms (c, g); as OTDD

MW2: Delon & Desolneux, SIAM J. Imaging Sciences 2020. OTDD: Alvarez-Melis & Fusi, NeurIPS 2020; its ground
cost is a distance between rows plus one between their labels' distributions; here a component stands for its
rows. CE-LoRA (arXiv 2503.23869) names mixtures and optimal transport and leaves the rest open.

Every minimum is exact. One row or one column leaves no choice; up to 3 × 3, all vertices of the polytope are
compared, thousands of problems at once; what is larger is a linear program (HiGHS' simplex).
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linprog
from torch import Tensor

from celora.maths.mixtures import Mixture

_EXACT = {"presolve": False, "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


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
    solved = linprog(
        (cost / scale).numpy().ravel(),
        A_eq=_marginals(*cost.shape),
        b_eq=np.concatenate([a.numpy(), b.numpy()[:-1]]),
        method="highs-ds",
        options=_EXACT,
    )
    if solved.x is None:
        raise RuntimeError(f"HiGHS found no transport plan of shape {tuple(cost.shape)}: {solved.message}")
    return total * torch.from_numpy(solved.x).clamp(min=0).reshape(cost.shape)


def transport(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """The least cost, Σ T · cost over the cheapest `plan`; same arguments and errors."""
    return float((plan(a, b, cost) * cost.double()).sum())


def component_costs(p: Mixture, q: Mixture) -> Tensor:
    """w2² between every component of `p` and every one of `q`: (G, H), float64; exactly 0 for equal ones.

    Raises:
        ValueError: if the mixtures do not live in the same space.
    """
    if p.means.shape[1] != q.means.shape[1]:
        raise ValueError(
            f"mixtures of dimension {p.means.shape[1]} and {q.means.shape[1]} cannot be compared: "
            "every client must use the same backbone"
        )
    x, y = (torch.cat([side.means, side.spreads], dim=1).double() for side in (p, q))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def class_distances(p: Mixture, q: Mixture) -> Tensor:
    """D² between every class of `p` and every class of `q`, in ascending order of label: (C, C'), float64."""
    return _class_distances(p, q, component_costs(p, q))


def mixture_distance(p: Mixture, q: Mixture, *, label_cost: float = 1.0) -> float:
    """d(p, q), in the unit of the features; `label_cost` is λ.

    Raises:
        ValueError: if a mixture is empty or the two do not live in the same space.
    """
    if not (p.labels.numel() and q.labels.numel()):
        raise ValueError("an empty mixture is at no distance from anything: leave it out, or pass None")
    cost = component_costs(p, q)
    if label_cost:
        rows, columns = (torch.unique(side.labels, return_inverse=True)[1] for side in (p, q))
        cost = cost + label_cost * _class_distances(p, q, cost)[rows][:, columns]
    a, b = (side.masses.double() / side.masses.double().sum() for side in (p, q))
    return sqrt(transport(a, b, cost))


def distance_matrix(mixtures: Sequence[Mixture | None], *, label_cost: float = 1.0) -> Tensor:
    """d between all clients: (m, m), float64, symmetric, 0 on the diagonal.

    Where a client has told nothing (None, or a mixture without components) its distance to others is NaN.
    """
    told = [(i, mixture) for i, mixture in enumerate(mixtures) if mixture and mixture.labels.numel()]
    distance = torch.full((len(mixtures), len(mixtures)), torch.nan, dtype=torch.float64)
    for (i, p), (j, q) in itertools.combinations(told, 2):
        distance[i, j] = distance[j, i] = mixture_distance(p, q, label_cost=label_cost)
    return distance.fill_diagonal_(0.0)


@lru_cache(maxsize=64)
def _marginals(n: int, m: int) -> sparse.csr_array:
    """Σ_j T_ij for all i, then Σ_i T_ij for all j but the last, which the others imply: (n + m - 1, n m)."""
    rows = sparse.kron(sparse.eye_array(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye_array(m))
    return sparse.csr_array(sparse.vstack([rows, columns]))[:-1]


@lru_cache(maxsize=9)
def _vertices(n: int, m: int) -> Tensor:
    """Flows of all basic solutions as linear maps of the marginals: (trees, n m, n + m), entries -1, 0, 1.

    The bases are the spanning trees of the complete bipartite graph K_nm: n^(m-1) m^(n-1), 81 at 3 × 3.
    """
    incidence = _marginals(n, m).toarray()
    size = n + m - 1
    flows = []
    for tree in map(list, itertools.combinations(range(n * m), size)):
        if abs(np.linalg.det(incidence[:, tree])) > 0.5:  # totally unimodular: 0 or ±1
            flow = np.zeros((n * m, n + m))
            flow[tree, :size] = np.linalg.inv(incidence[:, tree]).round()
            flows.append(flow)
    return torch.from_numpy(np.stack(flows))


def _tiny(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """Least costs of many problems of one small shape: a (..., n), b (..., m), cost (..., n, m) -> (...)."""
    flows = torch.einsum("tes,...s->...te", _vertices(*cost.shape[-2:]), torch.cat([a, b], dim=-1))
    costs = (flows * cost.flatten(-2).unsqueeze(-2)).sum(-1)
    return costs.masked_fill(flows.amin(-1) < -1e-12, torch.inf).amin(-1)


def _by_class(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Components of each class, padded with others', and their masses in it, 0 for padding: both (C, K)."""
    own = mixture.labels == torch.unique(mixture.labels)[:, None]
    slots = own.int().argsort(dim=1, descending=True, stable=True)[:, : int(own.sum(1).max())]
    masses = (own * mixture.masses.double()).gather(1, slots)
    return slots, masses / masses.sum(1, keepdim=True)


def _class_distances(p: Mixture, q: Mixture, costs: Tensor) -> Tensor:
    (rows, a), (columns, b) = _by_class(p), _by_class(q)
    shape = (len(a), len(b))
    a, b = a[:, None].expand(*shape, -1), b[None].expand(*shape, -1)
    costs = costs[rows[:, None, :, None], columns[None, :, None, :]]  # (C, C', K, K')
    if max(costs.shape[2:]) <= 3:
        return _tiny(a, b, costs)
    least = [transport(a[at], b[at], costs[at]) for at in itertools.product(*map(range, shape))]
    return torch.tensor(least, dtype=torch.float64).reshape(shape)
