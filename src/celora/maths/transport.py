"""How far apart two clients' data lie: exact optimal transport between class-conditional Gaussian mixtures.

    w2²((μ,σ), (ν,τ)) = ‖μ − ν‖² + ‖σ − τ‖²                     2-Wasserstein, diagonal Gaussians
    D²(c, c') = min_T Σ_gh T_gh w2²(g, h)                       T in Π(π_c, π_c'); MW2
    d²(p, q)  = min_T Σ T_cg,c'g' [w2²(g, g') + λ D²(c, c')]    T in Π(p, q), atoms (c, g); as OTDD

MW2: Delon & Desolneux, SIAM J. Imaging Sciences 2020. OTDD: Alvarez-Melis & Fusi, NeurIPS 2020; its ground
cost is a distance between rows plus one between their labels' distributions; here a component stands for its
rows. CE-LoRA (arXiv 2503.23869) names mixtures and optimal transport and leaves the rest open.

Every minimum is exact, and all arithmetic is float64. Between many mixtures, w2² is squared Euclidean distance
in [μ; σ], so a matrix product; D² of classes of up to three components is the best of all vertices of its dual,
thousands of problems at once; d², and what is larger, is POT's network simplex, problem by problem.

**A lower bound.** With m and s the mean and the standard deviations of a whole mixture,

    d²(p, q) ≥ (1 + λ) (‖m_p − m_q‖² + ‖s_p − s_q‖²),

because either term of d² is at least the cost of a coupling of the two mixtures as distributions (for the second,
glue the plans of D²), no coupling costs less than W2², and W2² is at least the sum over coordinates of the W2² of the
marginals, each at least that of its mean and standard deviation (Gelbrich, Math. Nachr. 1990).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from celora.lazy import Lazy, Tensor, np, torch
from celora.maths.mixtures import Mixture
from celora.maths.neighbours import most_alike

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS, COLUMNS = 16, 32
"""How many clients are compared with how many at a time, so that what is between them fits into a cache."""
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


def component_costs(p: Mixture, q: Mixture) -> Tensor:
    """w2² between every component of `p` and every one of `q`: (G, H), float64; exactly 0 for equal ones.

    Raises:
        ValueError: if the mixtures do not live in the same space.
    """
    _one_space([p, q])
    x, y = (torch.cat([side.means, side.spreads], dim=1).double() for side in (p, q))
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def class_distances(p: Mixture, q: Mixture) -> Tensor:
    """D² between every class of `p` and every class of `q`, in ascending order of label: (C, C'), float64.

    Raises:
        ValueError: if the mixtures do not live in the same space.
    """
    left, right = _Atoms.of([p]), _Atoms.of([q])
    return _class_costs(left, right, component_costs(p, q)[left.order][:, right.order])


def mixture_distance(p: Mixture, q: Mixture, *, label_cost: float = 1.0) -> float:
    """d(p, q), in the unit of the features; `label_cost` is λ.

    Raises:
        ValueError: if a mixture is empty or the two do not live in the same space.
    """
    if not (p.labels.numel() and q.labels.numel()):
        raise ValueError("an empty mixture is at no distance from anything: leave it out, or pass None")
    left, right = _Atoms.of([p]), _Atoms.of([q])
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
    atoms = _Atoms.of([mixture for i in order if (mixture := mixtures[i])])
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
    atoms = _Atoms.of(mixtures)
    rows, at = pairs[:, 0].sort(stable=True)
    firsts, counts = torch.unique_consecutive(rows, return_counts=True)
    for row, among in zip(firsts.tolist(), torch.split(at, counts.tolist()), strict=True):
        for some in torch.split(among, ROWS * COLUMNS):
            others = torch.stack([torch.zeros_like(some), torch.arange(len(some))], dim=1)
            one = atoms.part(range(row, row + 1))
            distances[some] = _distances(one, atoms.take(pairs[some, 1]), others, label_cost)
    return distances


def nearest_clients(
    mixtures: Sequence[Mixture],
    count: int,
    *,
    label_cost: float = 1.0,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """For each client, the `count` others with the least lower bound, nearest bound first, and d to each of them.

    The distances are exact; that these clients are the nearest is not: the bound (see above) ranks them, in float32.
    No (m, m) matrix is ever held.

    Args:
        mixtures: one for each client, none empty.
        count: from 1 to m − 1.
        label_cost: λ.
        known: pairs (P, 2) whose distances (P,) need not be computed again.

    Returns:
        (m, count) int32, positions in `mixtures`, and (m, count) float64.

    Raises:
        ValueError: if a mixture is empty, mixtures do not live in the same space, or `count` is out of range.
    """
    m = len(mixtures)
    points = moments(mixtures)
    points = (points - points.mean(dim=0)).float()
    near = most_alike(points, count, less=points.square().sum(1) / 2)  # ‖x − y‖² = ‖x‖² − 2 (xy − ‖y‖² / 2)
    keys = _keys(torch.stack([torch.arange(m).repeat_interleave(count), near.flatten().long()], dim=1), m)
    asked, back = torch.unique(keys, return_inverse=True)
    distances = torch.full(asked.shape, torch.nan, dtype=torch.float64)
    if known is not None and len(known[0]):
        old, order = _keys(known[0].long(), m).sort()
        at = torch.searchsorted(old, asked).clamp(max=len(old) - 1)
        distances = torch.where(old[at] == asked, known[1].double()[order[at]], torch.nan)
    missing = distances.isnan()
    pairs = torch.stack([asked[missing] // m, asked[missing] % m], dim=1)
    distances[missing] = pair_distances(mixtures, pairs, label_cost=label_cost)
    return near, distances[back].view(m, count)


def _keys(pairs: Tensor, m: int) -> Tensor:
    """One number for each pair (P, 2) of m clients, whichever is named first."""
    return pairs.amin(dim=1) * m + pairs.amax(dim=1)


def moments(mixtures: Sequence[Mixture]) -> Tensor:
    """[m; s] of each whole mixture, (n, 2 D), float64: √(1 + λ) times Euclidean distance here is at most d.

    Raises:
        ValueError: if one is empty or they do not live in the same space.
    """
    if not all(mixture.labels.numel() for mixture in mixtures):
        raise ValueError("an empty mixture has no mean: leave it out")
    if not mixtures:
        return torch.zeros(0, 0, dtype=torch.float64)
    _one_space(mixtures)
    return torch.cat([_moments(mixtures[start : start + 512]) for start in range(0, len(mixtures), 512)])


def _moments(mixtures: Sequence[Mixture]) -> Tensor:
    owner = torch.repeat_interleave(torch.tensor([len(mixture.labels) for mixture in mixtures]))

    def average(values: Tensor) -> Tensor:
        sums = torch.zeros(len(mixtures), *values.shape[1:], dtype=torch.float64)
        return sums.index_add_(0, owner, values)

    masses = torch.cat([mixture.masses for mixture in mixtures]).double()
    masses = (masses / average(masses)[owner])[:, None]
    means, spreads = (torch.cat([getattr(mixture, name) for mixture in mixtures]) for name in ("means", "spreads"))
    mean = average(masses * means)
    variance = average(masses * (spreads.double().square() + (means - mean[owner]).square()))
    return torch.cat([mean, variance.sqrt()], dim=1)


@dataclass(frozen=True)
class _Atoms:
    """The components of some mixtures: one mixture after the other, and each in order of label.

    Classes are counted through: label 3 of one mixture and label 3 of the next are two classes.
    """

    order: Tensor  # (A,) where each was in its mixture, counted through
    points: Tensor  # (A, 2 D) float32, [μ; σ]
    centre: Tensor  # (2 D,) float64, of all points: less cancels in ‖x‖² + ‖y‖² − 2 xy without it
    masses: Tensor  # (A,) sum to 1 in each mixture
    classes: Tensor  # (A,) the class of each
    slots: Tensor  # (K, C) the components of each class, or its first once more
    shares: Tensor  # (K, C) their masses in the class, 0 where it is once more
    starts: Tensor  # (n + 1,) where each mixture's components begin
    class_starts: Tensor  # (n + 1,) where its classes do

    @staticmethod
    def of(mixtures: Sequence[Mixture]) -> _Atoms:
        _one_space(mixtures)
        sizes = torch.tensor([len(mixture.labels) for mixture in mixtures], dtype=torch.int64)
        owner = torch.repeat_interleave(sizes)
        labels = torch.cat([mixture.labels for mixture in mixtures])
        order = torch.from_numpy(np.lexsort((labels.numpy(), owner.numpy())))
        owner, labels = owner[order], labels[order]
        masses = torch.cat([mixture.masses for mixture in mixtures]).double()[order]
        masses = masses / torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, owner, masses)[owner]

        points = torch.empty(len(order), 2 * mixtures[0].means.shape[1])
        for mixture, rows in zip(mixtures, torch.split(points, sizes.tolist()), strict=True):
            torch.cat([mixture.means, mixture.spreads], dim=1, out=rows)
        points = points if torch.equal(order, torch.arange(len(order))) else points[order]
        centre = torch.stack([rows.double().sum(dim=0) for rows in torch.split(points, 4096)]).sum(dim=0) / len(points)
        same = torch.stack([owner, labels]).long()
        owners, classes, counts = torch.unique_consecutive(same, dim=1, return_inverse=True, return_counts=True)
        firsts = counts.cumsum(0) - counts
        k = torch.arange(int(counts.max()))[:, None]
        slots = firsts + torch.where(k < counts, k, 0)
        shares = torch.where(k < counts, masses[slots], 0.0)
        return _Atoms(
            order, points, centre, masses, classes, slots, shares / shares.sum(0), _from(sizes),
            _from(torch.bincount(owners[0], minlength=len(sizes))),
        )  # fmt: skip

    def part(self, some: range) -> _Atoms:
        """These mixtures, without copying."""
        start, end = some[0], some[-1] + 1
        (a, b), (c, d) = ((int(s[start]), int(s[end])) for s in (self.starts, self.class_starts))
        return _Atoms(
            self.order[a:b], self.points[a:b], self.centre, self.masses[a:b], self.classes[a:b] - c,
            self.slots[:, c:d] - a, self.shares[:, c:d], self.starts[start : end + 1] - a,
            self.class_starts[start : end + 1] - c,
        )  # fmt: skip

    def take(self, which: Tensor) -> _Atoms:
        """These mixtures, in this order."""
        atoms, starts, back = _ranges(self.starts, which)
        classes, class_starts, class_back = _ranges(self.class_starts, which)
        shift = back[starts[:-1].repeat_interleave(class_starts.diff())]
        return _Atoms(
            self.order[atoms], self.points[atoms], self.centre, self.masses[atoms],
            self.classes[atoms] - class_back[class_starts[:-1].repeat_interleave(starts.diff())],
            self.slots[:, classes] - shift, self.shares[:, classes], starts, class_starts,
        )  # fmt: skip


def _from(sizes: Tensor) -> Tensor:
    """Where runs of these sizes begin, and where the last ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def _ranges(starts: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `which` of many: their members, where each now begins, and how far each member came forward."""
    sizes = starts.diff()[which]
    begins = _from(sizes)
    back = (starts[which] - begins[:-1]).repeat_interleave(sizes)
    return torch.arange(len(back)) + back, begins, back


def _one_space(mixtures: Sequence[Mixture]) -> None:
    dims = sorted({mixture.means.shape[1] for mixture in mixtures})
    if len(dims) > 1:
        raise ValueError(
            f"mixtures of dimension {' and '.join(map(str, dims))} cannot be compared: "
            "every client must use the same backbone"
        )


def _distances(some: _Atoms, others: _Atoms, pairs: Tensor, label_cost: float) -> Tensor:
    """d of the pairs (P, 2) between some mixtures and others: (P,), float64."""
    cost = _squares(some, others)
    if label_cost:
        cost += label_cost * _class_costs(some, others, cost)[some.classes][:, others.classes]
    left, right = some.starts.tolist(), others.starts.tolist()
    a, b, costs = some.masses.numpy(), others.masses.numpy(), cost.numpy()
    found = []
    for i, j in pairs.tolist():
        rows, columns = slice(left[i], left[i + 1]), slice(right[j], right[j + 1])
        found.append(_least(a[rows], b[columns], costs[rows, columns]))
    return torch.tensor(found, dtype=torch.float64).sqrt()


def _squares(some: _Atoms, others: _Atoms) -> Tensor:
    """w2² between all components, (A, A'): by a product, but one by one where most of it would cancel."""
    x, y = (side.points.double() - side.centre for side in (some, others))
    sizes = x.square().sum(1)[:, None] + y.square().sum(1)
    cost = torch.addmm(sizes, x, y.T, alpha=-2)
    close = (cost <= 1e-6 * sizes).nonzero()
    for row, column in (pairs.unbind(1) for pairs in torch.split(close, 4096)):
        cost[row, column] = (x[row] - y[column]).square().sum(1)
    return cost


def _class_costs(some: _Atoms, others: _Atoms, cost: Tensor) -> Tensor:
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
    return _small(some.shares[..., None], others.shares[:, None], costs)


def _small(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
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


def _least(a: NDArray[np.float64], b: NDArray[np.float64], cost: NDArray[np.float64]) -> float:
    """The least cost of one transport, where no cost is negative."""
    if len(a) == 1 or len(b) == 1:
        return float(a @ cost @ b)
    least = _simplex(a, b, np.ascontiguousarray(cost))[1]
    return least if least > ROUNDING * float(cost.max()) else 0.0


def _simplex(a: Any, b: Any, cost: Any) -> tuple[NDArray[np.float64], float]:
    """POT's compiled solver, called without `ot.emd` around it, whose checks take half as long as a small problem."""
    moved, least, _, _, code = pot.emd_c(a, b, cost, 1_000_000, 1)
    if code != _OPTIMAL:
        raise RuntimeError(f"POT found no transport plan of shape {cost.shape}: its network simplex ended with {code}")
    return moved, float(least)
