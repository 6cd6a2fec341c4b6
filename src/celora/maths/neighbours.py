"""The most alike of many clients, and averages over them, without a matrix of all pairs.

Similarity here is an inner product of two clients' points, of which CKA is one (`celora.maths.cka.points`); Euclidean
distance becomes one when half of ‖y‖² is taken from it. Products are blocks of float32.
"""

from celora.lazy import Lazy, Tensor, np, torch

sparse = Lazy("scipy.sparse")
ROWS = 1024
"""Clients whose similarity to all others is held at a time."""
ELEMENTS = 2**23
"""Numbers gathered at a time."""


def most_alike(points: Tensor, count: int, *, less: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """For each client the `count` others with the largest x·y − less_y: (m, count) int32, the largest first.

    Args:
        points: (m, d).
        count: from 1 to m − 1.
        less: (m,), or None for 0.
        rows: positions (n,) of the clients that are asked for, the result then being (n, count); None for all.

    Raises:
        ValueError: if `count` is out of range.
    """
    m = len(points)
    if not 1 <= count < m:
        raise ValueError(f"each of {m} clients has 1 to {m - 1} others: found a count of {count}")
    points, found = points.float(), []
    for some in torch.split(torch.arange(m) if rows is None else rows, ROWS):
        alike = points[some] @ points.T
        if less is not None:
            alike -= less.float()
        alike[torch.arange(len(some)), some] = -torch.inf
        found.append(alike.topk(count, dim=1).indices.int())
    return torch.cat(found)


def likeness(points: Tensor, neighbours: Tensor) -> Tensor:
    """x_i · x_j for j in row i of `neighbours` (m, k): (m, k) float64 numbers of float32 precision."""
    points, (m, k) = points.float(), neighbours.shape
    rows = max(1, ELEMENTS // max(1, points.shape[1] * k))
    found = torch.empty(m, k, dtype=torch.float64)
    room = torch.empty(rows * k, points.shape[1])  # taken once: taken and given back each time, the heap would grow
    for start in range(0, m, rows):
        some = neighbours[start : start + rows].long()
        among = torch.index_select(points, 0, some.flatten(), out=room[: some.numel()]).view(*some.shape, -1)
        found[start : start + rows] = (among @ points[start : start + rows].unsqueeze(-1)).squeeze(-1)
    return found


def with_self(others: Tensor) -> Tensor:
    """Each row of positions (m, k) after its own: (m, 1 + k)."""
    return torch.cat([torch.arange(len(others))[:, None], others], dim=1)


def average(values: Tensor, weights: Tensor, neighbours: Tensor | None = None) -> Tensor:
    """Σ_n weights[i, n] values[neighbours[i, n]] for each client i, accumulated in float64: as `values`.

    Args:
        values: (m, ...).
        weights: (m, k).
        neighbours: (m, k), or None where k = m and each is in its place.
    """
    flat = values.flatten(1).double()
    if neighbours is None:
        mixed = weights.double() @ flat
    else:
        m, k = neighbours.shape
        ends = np.arange(0, m * k + 1, k, dtype=np.int64)
        entries = (weights.double().numpy().ravel(), neighbours.numpy().ravel().astype(np.int64), ends)
        mixed = torch.from_numpy(sparse.csr_array(entries, shape=(m, len(values))) @ flat.numpy())
    return mixed.to(values.dtype).view_as(values)
