"""How far apart a server knows its clients' data to lie, brought up to date as data summaries arrive.

A distance is computed once for a pair of summaries: of clients that arrive later, or tell anew, only their own are.

    few clients     all distances (n, n)
    many clients    those to `count` candidates of each (`celora.maths.nearest`); no (m, m) matrix is ever held

Each distance is exact. What is approximate for many is that a truly nearer client may be no candidate, that a client
that has told nothing is no candidate of one that has, and that typical distances are those between 64 clients, evenly
spaced among those that have told.

Clients go by name in mappings, and by position in tensors: the order of the mapping. A client has told of its data if
its mixture has components.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from celora.lazy import Tensor, torch
from celora.maths.distances import distance_matrix
from celora.maths.mixtures import Mixture
from celora.maths.nearest import nearest_clients
from celora.maths.neighbours import most_alike, with_self

SAMPLE = 64
"""Of many clients, those whose distances to each other are typical."""


class Known(NamedTuple):
    """Distances between clients, float64.

    Attributes:
        distances: (n, n) between all summaries, NaN where one tells nothing; or (n, c) from each client that has told
            to its candidates.
        near: (n, c) int32, those candidates, positions among the clients that have told; or empty.
        typical: (p,), some distances between clients of any kind, where there are candidates; or empty.
    """

    distances: Tensor
    near: Tensor
    typical: Tensor


def told(summaries: Mapping[str, Mixture]) -> dict[str, Mixture]:
    """Those that say anything."""
    return {client: mixture for client, mixture in summaries.items() if len(mixture.labels)}


def of_one_space(summaries: Mapping[str, Mixture]) -> dict[str, Mixture]:
    """Those of the dimension that most have, and those that say nothing."""
    most = Counter(mixture.means.shape[1] for mixture in told(summaries).values()).most_common(1)
    return {
        client: mixture
        for client, mixture in summaries.items()
        if not len(mixture.labels) or mixture.means.shape[1] == most[0][0]
    }


def updated(
    summaries: Mapping[str, Mixture],
    known: Known,
    before: Mapping[str, Mixture],
    new: Collection[str],
    count: int | None,
    *,
    label_cost: float,
) -> Known:
    """What is known when summaries have arrived.

    Args:
        summaries: those of now, of one space.
        known: the distances between those of before.
        before: the summaries then.
        new: clients of `summaries` that were not among them, or have told anew.
        count: candidates of each client, found anew among all, so that they do not depend on the order of arrival;
            nothing is known while no more than that have told. None: all are compared.
        label_cost: λ.
    """
    if count is None:
        return _between_all(summaries, known, before, new, label_cost)
    return _to_candidates(summaries, known, before, new, count, label_cost)


def _between_all(
    summaries: Mapping[str, Mixture],
    known: Known,
    before: Mapping[str, Mixture],
    new: Collection[str],
    label_cost: float,
) -> Known:
    if not new:
        return known
    places = {client: i for i, client in enumerate(before) if client in summaries and client not in new}
    order = [*places, *(client for client in summaries if client not in places)]
    at = torch.tensor(list(places.values()), dtype=torch.int64)
    found = distance_matrix(
        [summaries[client] for client in order], label_cost=label_cost, known=known.distances[at][:, at]
    )
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
    return known._replace(distances=found[back][:, back])


def _to_candidates(
    summaries: Mapping[str, Mixture],
    known: Known,
    before: Mapping[str, Mixture],
    new: Collection[str],
    count: int,
    label_cost: float,
) -> Known:
    those = told(summaries)
    if len(those) <= count:
        return Known(torch.zeros(0, 0), torch.zeros(0, 0).int(), torch.zeros(0, 0))
    if not new and known.near.shape == (len(those), count):
        return known
    old = None
    if len(known.near):
        places = {client: i for i, client in enumerate(those) if client not in new}
        at = torch.tensor([places.get(client, -1) for client in told(before)])
        pairs = torch.stack([at[:, None].expand_as(known.near), at[known.near.long()]], dim=-1)
        still = (pairs >= 0).all(dim=-1)
        old = pairs[still], known.distances[still]
    mixtures = list(those.values())
    near, distances = nearest_clients(mixtures, count, label_cost=label_cost, known=old)
    among = distance_matrix(mixtures[:: -(-len(mixtures) // SAMPLE)], label_cost=label_cost)
    return Known(distances, near, among[torch.ones_like(among).triu(1).bool()])


def placed(known: Known, summaries: Mapping[str, Mixture], clients: tuple[str, ...]) -> Tensor:
    """All distances (m, m) among `clients`, NaN for those without a summary, and 0 on the diagonal."""
    places = {client: i for i, client in enumerate(summaries)}
    at = torch.tensor([places.get(client, -1) for client in clients])
    among = torch.full((len(places) + 1, len(places) + 1), torch.nan, dtype=torch.float64)
    among[:-1, :-1] = known.distances
    return among[at[:, None], at].fill_diagonal_(0.0)


def candidates(
    known: Known, summaries: Mapping[str, Mixture], clients: tuple[str, ...], points: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Each client itself and its `count` candidates, and the distances to them.

    A client that has told nothing, or everybody where `known` holds no candidates, is given those with the largest
    inner product of `points` (m, d), at an unknown distance.

    Returns:
        (m, 1 + count) int64, positions in `clients`, and (m, 1 + count) float64, NaN where unknown.
    """
    m = len(clients)
    place = {client: i for i, client in enumerate(clients)}
    those = torch.tensor([place[c] for c in told(summaries)] if len(known.near) else [], dtype=torch.int64)
    silent = torch.ones(m, dtype=torch.bool)
    silent[those] = False
    near = torch.zeros(m, count, dtype=torch.int64)
    near[those] = those[known.near.long()].view(-1, count)
    near[silent] = most_alike(points, count, rows=silent.nonzero().flatten()).long()
    distance = torch.full((m, 1 + count), torch.nan, dtype=torch.float64)
    distance[those, 1:] = known.distances.double().view(-1, count)
    distance[:, 0] = 0.0
    return with_self(near), distance
