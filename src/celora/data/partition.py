"""Who holds which rows: five ways to deal a table to clients, and one rule for rows whose split is fixed.

    iid         shuffled and cut into equal parts
    dirichlet   label skew: each label is cut by proportions p ~ Dir(alpha) over the clients
    classes     label skew: each client holds k labels; a label is shared equally by its holders
    quantity    size skew: the shuffled rows are cut by proportions p ~ Dir(alpha) over the clients
    natural     by a column, or by the file a row came from

Label skew by a Dirichlet over clients is M. Yurochkin et al., "Bayesian Nonparametric Federated Learning of
Neural Networks", ICML 2019, https://arxiv.org/abs/1905.12022; `classes` and `quantity` are from Q. Li
et al., "Federated Learning on Non-IID Data Silos: An Experimental Study" (NIID-Bench), ICDE 2022,
https://arxiv.org/abs/2102.02079. (T.-M. H. Hsu et al., https://arxiv.org/abs/1909.06335, draw the mix of
labels of each client instead, with equal sizes; here sizes differ too, and with a small alpha a client may
come out empty.)

What is called a label here is the stratum that the task puts a row into; without strata there are `iid`, `quantity`
and `natural`.

Rows that the source fixes as validation or test are dealt by the same rule: natural rows to their own group,
else each label in the proportions in which the clients hold that label's training rows. A client's test mix
is therefore its training mix whenever the two sets as wholes have the same mix, and every fixed row is dealt
exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from celora.data.table import ClientRows, Table, counted, did_you_mean, listing, natural_key
from celora.errors import DataError
from celora.lazy import np
from celora.rng import Address, numpy_generator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Weights = NDArray[np.float64]

Kind = Literal["iid", "dirichlet", "classes", "quantity", "natural"]
Hands = dict[str, list[int]]
"""Client id -> rows."""


def partition_rows(
    table: Table, kind: Kind, *, strata: Sequence[str] | None, clients: int = 8, alpha: float = 0.5,
    classes_per_client: int = 2, clients_per_group: int = 1, seed: int = 0,
) -> dict[str, ClientRows]:  # fmt: skip
    """Deal every row of the table to exactly one client; only the test rows of an empty group go to nobody.

    Args:
        strata: the label of each row; None: there are none.
        clients: how many clients ("client-00", …); a natural partition has as many as there are groups.
        alpha: concentration of the Dirichlet; small is skewed.
        classes_per_client: how many labels a client holds (`classes`).
        clients_per_group: a group is cut at random into so many clients, "books-0", "books-1" (`natural`).

    Returns:
        Client id -> its rows, in natural order of the ids. `train` is everything that the source does not fix
        as validation or test; a client's `train` may be empty, and then so are its other two.

    Raises:
        DataError: a label or group without training rows, fewer rows than clients, an impossible partition.
    """
    train = _rows(table, "train")
    if not train:
        raise DataError("found no training row: every row is marked as validation or test. Mark some rows 'train'.")
    if strata is not None:
        _check_labels(table, strata, train)
    elif kind in ("dirichlet", "classes"):
        raise DataError(
            f"partition = {kind!r} deals rows by their label, and the task puts none on them; expected 'iid', "
            "'quantity' or 'natural'. Change partition in [data]."
        )
    labels = [""] * len(table) if strata is None else strata
    if kind == "natural":
        families = _natural(table, train, clients_per_group, seed)
    else:
        families = {"": _drawn(labels, train, kind, clients=clients, alpha=alpha, each=classes_per_client, seed=seed)}
    fixed = {split: _by_group(table, _rows(table, split), kind) for split in ("validation", "test")}
    shares = {}
    for group, hands in families.items():  # a family shares the fixed rows of its group
        validation, test = (
            _follow(labels, rows.get(group, []), hands, seed, ("partition", kind, split, group))
            for split, rows in fixed.items()
        )
        for client in hands:
            shares[client] = ClientRows(sorted(hands[client]), sorted(validation[client]), sorted(test[client]))
    return {client: shares[client] for client in sorted(shares, key=natural_key)}


def cut(rows: Sequence[int], weights: Weights, rng: np.random.Generator) -> list[list[int]]:
    """Shuffle the rows and cut them into parts in proportion to `weights`; a weight of 0 gets no row.

    Each part is within one row of its exact proportion; which parts are rounded up is drawn, too.
    """
    order = rng.permutation(len(weights))
    bounds = np.cumsum(weights[order])
    bounds = np.rint(bounds / bounds[-1] * len(rows)).astype(np.int64)
    parts = np.split(rng.permutation(np.asarray(rows, dtype=np.int64)), bounds[:-1])
    return [parts[place].tolist() for place in np.argsort(order)]


def _drawn(
    labels: Sequence[str], train: list[int], kind: Kind, *, clients: int, alpha: float, each: int, seed: int
) -> Hands:
    if len(train) < clients:
        raise DataError(
            f"found {counted(len(train), 'training row')} for {clients} clients, expected at least one "
            f"for each. Set clients = {len(train)} or fewer in [data], or bring more rows."
        )
    rng = numpy_generator(seed, "partition", kind)
    by_label = _by_label(labels, train)
    if kind in ("iid", "quantity"):
        weights = np.ones(clients) if kind == "iid" else rng.dirichlet(np.full(clients, alpha))
        parts = cut(train, weights, rng)
    else:
        holders = _holders(list(by_label), clients, each, rng) if kind == "classes" else {}
        parts = [[] for _ in range(clients)]
        for label, rows in by_label.items():
            draw = numpy_generator(seed, "partition", kind, label)
            weights = holders[label] if kind == "classes" else draw.dirichlet(np.full(clients, alpha))
            for part, more in zip(parts, cut(rows, weights, draw), strict=True):
                part.extend(more)
    width = max(2, len(str(clients - 1)))
    return {f"client-{number:0{width}}": part for number, part in enumerate(parts)}


def _holders(labels: list[str], clients: int, each: int, rng: np.random.Generator) -> dict[str, Weights]:
    """Which clients hold a label, as 0/1 weights (clients,): every client takes those with fewest holders."""
    if each > len(labels) or clients * each < len(labels):
        raise DataError(
            f"{clients} clients with {counted(each, 'label')} each do not fit {len(labels)} labels: "
            f"expected classes_per_client between {-(-len(labels) // clients)} and {len(labels)}, so "
            "that every label has a holder and none is needed twice. Change classes_per_client or clients."
        )
    held = np.zeros((len(labels), clients))
    for client in range(clients):
        fewest_first = np.lexsort((rng.random(len(labels)), held.sum(axis=1)))
        held[fewest_first[:each], client] = 1
    return dict(zip(labels, held, strict=True))


def _natural(table: Table, train: list[int], clients_per_group: int, seed: int) -> dict[str, Hands]:
    """Group -> its clients' rows."""
    if table.groups is None:
        raise DataError(
            "partition = 'natural' found neither a client column nor several files. Name the column by "
            "`client` in [data], give one file for each client, or choose another: "
            f"{listing(get_args(Kind)[:-1])}."
        )
    rows = _by_group(table, train, "natural")
    homeless = [row for row, group in enumerate(table.groups) if group not in rows and group not in table.empty]
    if homeless:
        group = table.groups[homeless[0]]
        count = sum(table.groups[row] == group for row in homeless)
        raise DataError(
            f"{counted(count, 'row')} of {group!r} (first: {table.rows[homeless[0]]}) would have no client: "
            f"{group!r} has no training rows.{did_you_mean(group, rows)} Clients with training rows: "
            f"{listing(rows)}. Give {group!r} training rows, rename it, or remove its rows."
        )
    if clients_per_group == 1:
        return {group: {group: held} for group, held in rows.items()}
    families = {}
    for group, held in rows.items():
        rng = numpy_generator(seed, "partition", "natural", group)
        parts = cut(held, np.ones(clients_per_group), rng)
        families[group] = {f"{group}-{number}": part for number, part in enumerate(parts)}
    return families


def _follow(labels: Sequence[str], fixed: list[int], hands: Hands, seed: int, address: tuple[Address, ...]) -> Hands:
    """Deal fixed rows to those who hold training rows of the same label, in proportion."""
    counts = {client: Counter(labels[row] for row in held) for client, held in hands.items()}
    dealt: Hands = {client: [] for client in hands}
    for label, rows in _by_label(labels, fixed).items():
        weights = np.array([count[label] for count in counts.values()], dtype=np.float64)
        if not weights.any():  # only other groups train on this label
            weights = np.array([len(held) for held in hands.values()], dtype=np.float64)
        for part, more in zip(dealt.values(), cut(rows, weights, numpy_generator(seed, *address, label)), strict=True):
            part.extend(more)
    return dealt


def _check_labels(table: Table, labels: Sequence[str], train: list[int]) -> None:
    trained = {labels[row] for row in train}
    for split in ("validation", "test"):
        for label, rows in _by_label(labels, _rows(table, split)).items():
            if label not in trained:
                raise DataError(
                    f"the label {label!r} is seen in {counted(len(rows), f'{split} row')} (first: "
                    f"{table.rows[rows[0]]}) and in no training row, so nobody can learn it."
                    f"{did_you_mean(label, trained)} Add training rows with this label, or remove those rows."
                )
    if len(trained) == 1:
        raise DataError(
            f"the label of all training rows ({len(train):,}) is {min(trained)!r}; a classifier needs at "
            "least two labels. Check `label` in [data]."
        )


def _rows(table: Table, split: str) -> list[int]:
    if table.splits is None:
        return list(range(len(table))) if split == "train" else []
    return [row for row, one in enumerate(table.splits) if one == split]


def _by_group(table: Table, rows: Sequence[int], kind: Kind) -> dict[str, list[int]]:
    """Group -> its rows; one group "" unless the partition is natural."""
    found: dict[str, list[int]] = {}
    for row in rows:
        group = table.groups[row] if kind == "natural" and table.groups is not None else ""
        found.setdefault(group, []).append(row)
    return found


def _by_label(labels: Sequence[str], rows: Sequence[int]) -> dict[str, list[int]]:
    """Label -> its rows, labels sorted."""
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(labels[row], []).append(row)
    return dict(sorted(found.items()))
