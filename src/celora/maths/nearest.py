"""The clients whose data lie nearest, among too many to compare all: a lower bound chooses, exact distances follow.

With m and s the mean and the standard deviations of a whole mixture,

    d²(p, q) ≥ (1 + λ) (‖m_p − m_q‖² + ‖s_p − s_q‖²),        d as in celora.maths.distances

because either term of d² is at least the cost of a coupling of the two mixtures as distributions (for the second,
glue the plans of D²), no coupling costs less than W2², and W2² is at least the sum over coordinates of the W2² of the
marginals, each at least that of its mean and standard deviation (Gelbrich, Math. Nachr. 1990).
"""

from collections.abc import Sequence

from celora.lazy import Tensor, torch
from celora.maths.distances import pair_distances
from celora.maths.mixtures import Mixture, check_space
from celora.maths.neighbours import most_alike


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
    check_space(mixtures)
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
