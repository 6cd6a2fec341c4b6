"""How far apart two clients' data lie: exact optimal transport between class-conditional Gaussian mixtures.

    w2²((μ,σ), (ν,τ)) = ‖μ − ν‖² + ‖σ − τ‖²                     2-Wasserstein, diagonal Gaussians
    D²(c, c') = min_T Σ_gh T_gh w2²(g, h)                       T in Π(π_c, π_c'); MW2
    d²(p, q)  = min_T Σ T_cg,c'g' [w2²(g, g') + λ D²(c, c')]    T in Π(p, q), atoms (c, g); as OTDD

MW2: Delon & Desolneux, SIAM J. Imaging Sciences 2020. OTDD: Alvarez-Melis & Fusi, NeurIPS 2020; its ground
cost is a distance between rows plus one between their labels' distributions; here a component stands for its
rows. CE-LoRA (arXiv 2503.23869) names mixtures and optimal transport and leaves the rest open.

Every minimum is exact, and all arithmetic is float64. Between many mixtures, w2² is squared Euclidean distance
in [μ; σ], so a matrix product; D² of classes of up to three components is solved for thousands of classes at once; d²,
and what is larger, problem by problem (`celora.maths.transport`).
"""

from collections.abc import Sequence
from math import sqrt

from celora.lazy import Tensor, torch
from celora.maths.atoms import Atoms
from celora.maths.mixtures import Mixture, check_space
from celora.maths.transport import least_cost, least_costs, transport

ROWS, COLUMNS = 16, 32
"""How many clients are compared with how many at a time, so that what is between them fits into a cache."""


def component_costs(p: Mixture, q: Mixture) -> Tensor:
    """w2² between every component of `p` and every one of `q`: (G, H), float64; exactly 0 for equal ones.

    Raises:
        ValueError: if the mixtures do not live in the same space.
    """
    check_space([p, q])
    x, y = (torch.cat([side.means, side.spreads], dim=1).double() for side in (p, q))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def class_distances(p: Mixture, q: Mixture) -> Tensor:
    """D² between every class of `p` and every class of `q`, in ascending order of label: (C, C'), float64.

    Raises:
        ValueError: if the mixtures do not live in the same space.
    """
    left, right = Atoms.of([p]), Atoms.of([q])
    return _class_costs(left, right, component_costs(p, q)[left.order][:, right.order])


def mixture_distance(p: Mixture, q: Mixture, *, label_cost: float = 1.0) -> float:
    """d(p, q), in the unit of the features; `label_cost` is λ.

    Raises:
        ValueError: if a mixture is empty or the two do not live in the same space.
    """
    if not (p.labels.numel() and q.labels.numel()):
        raise ValueError("an empty mixture is at no distance from anything: leave it out, or pass None")
    left, right = Atoms.of([p]), Atoms.of([q])
    cost = component_costs(p, q)[left.order][:, right.order]
    if label_cost:
        between = _class_costs(left, right, cost)
        cost = cost + label_cost * between[left.classes][:, right.classes]
    return sqrt(max(0.0, transport(left.masses, right.masses, cost)))


def distance_matrix(
    mixtures: Sequence[Mixture | None], *, label_cost: float = 1.0, known: Tensor | None = None
) -> Tensor:
    """d between all clients: (m, m), float64, symmetric, 0 on the diagonal.

    Each entry is `mixture_distance` of the two to a relative 1e-9, whoever else is there; equal mixtures are at 0.
    Where a client has told nothing (None, or a mixture without components) its distance to others is NaN.

    Args:
        mixtures: one for each client.
        label_cost: λ.
        known: (k, k), what an earlier call said of the first k: only pairs with one of the others are computed.

    Raises:
        ValueError: if mixtures do not live in the same space, or `known` is not square, too large, or NaN where
            both clients have told.
    """
    m, told = len(mixtures), [i for i, mixture in enumerate(mixtures) if mixture and mixture.labels.numel()]
    known = torch.zeros(0, 0) if known is None else known
    if known.shape != (len(known), len(known)) or len(known) > m:
        raise ValueError(f"known distances among the first k of {m} clients are (k, k): found {tuple(known.shape)}")
    distance = torch.full((m, m), torch.nan, dtype=torch.float64)
    distance[: len(known), : len(known)] = known
    old = [i for i in told if i < len(known)]
    if distance[old][:, old].isnan().any():
        raise ValueError("known distances hold NaN between clients that have told of their data: leave them out")
    if not told:
        return distance.fill_diagonal_(0.0)
    order = told[len(old) :] + old  # the new ones first: a row for each of them
    new, at = len(told) - len(old), torch.tensor(order, dtype=torch.int64)
    atoms = Atoms.of([mixture for i in order if (mixture := mixtures[i])])
    for top in range(0, new, ROWS):
        for left in range(top, len(order), COLUMNS):
            rows, columns = range(top, min(top + ROWS, new)), range(left, min(left + COLUMNS, len(order)))
            pairs = torch.tensor([(i, j) for i in rows for j in columns if i < j], dtype=torch.int64).reshape(-1, 2)
            ends = (rows[0], columns[0])
            found = _distances(atoms.part(rows), atoms.part(columns), pairs - torch.tensor(ends), label_cost)
            i, j = at[pairs].unbind(1)
            distance[i, j] = distance[j, i] = found
    return distance.fill_diagonal_(0.0)


def pair_distances(mixtures: Sequence[Mixture], pairs: Tensor, *, label_cost: float = 1.0) -> Tensor:
    """d of some pairs of clients: (P,), float64, each as in `distance_matrix`.

    Args:
        mixtures: one for each client, none empty.
        pairs: (P, 2), positions in `mixtures`; cheapest where those with the same first one are many.
        label_cost: λ.

    Raises:
        ValueError: if mixtures do not live in the same space or one that is asked for is empty.
    """
    if empty := [i for i in torch.unique(pairs).tolist() if not mixtures[i].labels.numel()]:
        raise ValueError(f"an empty mixture is at no distance from anything: found some at positions {empty[:8]}")
    distances = torch.zeros(len(pairs), dtype=torch.float64)
    if not len(pairs):
        return distances
    atoms = Atoms.of(mixtures)
    rows, at = pairs[:, 0].sort(stable=True)
    firsts, counts = torch.unique_consecutive(rows, return_counts=True)
    for row, among in zip(firsts.tolist(), torch.split(at, counts.tolist()), strict=True):
        for some in torch.split(among, ROWS * COLUMNS):
            others = torch.stack([torch.zeros_like(some), torch.arange(len(some))], dim=1)
            one = atoms.part(range(row, row + 1))
            distances[some] = _distances(one, atoms.take(pairs[some, 1]), others, label_cost)
    return distances


def _distances(some: Atoms, others: Atoms, pairs: Tensor, label_cost: float) -> Tensor:
    """d of the pairs (P, 2) between some mixtures and others: (P,), float64."""
    cost = _squares(some, others)
    if label_cost:
        cost += label_cost * _class_costs(some, others, cost)[some.classes][:, others.classes]
    left, right = some.starts.tolist(), others.starts.tolist()
    a, b, costs = some.masses.numpy(), others.masses.numpy(), cost.numpy()
    found = []
    for i, j in pairs.tolist():
        rows, columns = slice(left[i], left[i + 1]), slice(right[j], right[j + 1])
        found.append(least_cost(a[rows], b[columns], costs[rows, columns]))
    return torch.tensor(found, dtype=torch.float64).sqrt()


def _squares(some: Atoms, others: Atoms) -> Tensor:
    """w2² between all components, (A, A'): by a product, but one by one where most of it would cancel."""
    x, y = (side.points.double() - side.centre for side in (some, others))
    sizes = x.square().sum(1)[:, None] + y.square().sum(1)
    cost = torch.addmm(sizes, x, y.T, alpha=-2)
    close = (cost <= 1e-6 * sizes).nonzero()
    for row, column in (pairs.unbind(1) for pairs in torch.split(close, 4096)):
        cost[row, column] = (x[row] - y[column]).square().sum(1)
    return cost


def _class_costs(some: Atoms, others: Atoms, cost: Tensor) -> Tensor:
    """D² between all classes, (C, C'), from w2² between all components."""
    if max(len(some.slots), len(others.slots)) > 3:
        a, b = some.shares.T, others.shares.T
        least = [
            transport(a[r], b[s], cost[some.slots[:, r]][:, others.slots[:, s]])
            for r in range(len(a))
            for s in range(len(b))
        ]
        return torch.tensor(least, dtype=torch.float64).reshape(len(a), len(b))
    costs = cost[some.slots[:, None, :, None], others.slots[None, :, None, :]]  # (K, K', C, C')
    return least_costs(some.shares[..., None], others.shares[:, None], costs)
