"""Each client's own training, validation and test rows, drawn from the same mix of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from celora.data.table import ClientRows
from celora.lazy import np
from celora.rng import numpy_generator


def split_rows(
    held: ClientRows, labels: Sequence[str], client: str, *, validation: float, test: float,
    rows: int | None = None, max_validation: int | None = None, max_test: int | None = None, seed: int = 0,
) -> ClientRows:  # fmt: skip
    """Cut a client's training rows into three disjoint parts, then cap each part.

    The parts are stratified: each holds the labels nearly in proportion. One row of each label always trains,
    so a label with a single row is never tested. From 3 rows on, validation and test get at least one row
    each, where so many remain; rows too few for both shares are divided between them.

    Args:
        held: the client's rows; those in `validation` and `test` are fixed by the source and stay there.
        labels: the label of every row of the table.
        validation, test: shares of `held.train`; 0 where the source fixes that split.
        rows, max_validation, max_test: at most so many rows of each part, in the mix of the part.

    Returns:
        Sorted lists of rows. Without caps, every row of `held` is in exactly one of them.
    """
    rng = numpy_generator(seed, "split", client)
    order = interleave(held.train, labels, rng)
    first = {labels[row]: row for row in reversed(order)}
    reserve = set(first.values())
    free = [row for row in order if row not in reserve]
    tested, validated = _sizes(len(order), len(free), test, validation)
    parts = (
        (sorted(reserve) + free[tested + validated :], rows),
        (held.validation + free[tested : tested + validated], max_validation),
        (held.test + free[:tested], max_test),
    )
    return ClientRows(*(sorted(interleave(part, labels, rng)[:limit]) for part, limit in parts))


def interleave(rows: Sequence[int], labels: Sequence[str], rng: np.random.Generator) -> list[int]:
    """A random order of the rows in which every prefix has about the mix of labels of the whole.

    Systematic sampling: the i-th of a label's n shuffled rows is placed at (i + u) / n, u uniform in [0, 1)
    and drawn once for each label.
    """
    shuffled = rng.permutation(np.asarray(rows, dtype=np.int64)).tolist()
    total = Counter(labels[row] for row in shuffled)
    offset = {label: rng.random() for label in sorted(total)}
    seen: Counter[str] = Counter()
    place: dict[int, float] = {}
    for row in shuffled:
        label = labels[row]
        place[row] = (seen[label] + offset[label]) / total[label]
        seen[label] += 1
    return sorted(shuffled, key=lambda row: place[row])


def _sizes(total: int, free: int, test: float, validation: float) -> tuple[int, int]:
    """How many of a client's `total` rows test and validate, when `free` of them may."""
    tested, validated = (max(round(total * share), int(total >= 3)) if share > 0 else 0 for share in (test, validation))
    if tested + validated > free:
        both = int(tested > 0 and validated > 0 and free >= 2)
        tested = min(max(round(free * tested / (tested + validated) + 1e-9), both), free - both)
        validated = min(free - tested, validated)
    return tested, validated
