"""Partitions and splits: every example once, whatever the labels and the seed."""

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celora.data.inputs import Texts
from celora.data.partition import Kind, cut, partition_rows
from celora.data.row_split import interleave, split_rows
from celora.data.table import ClientRows, Table
from celora.errors import DataError

LABELS = st.lists(st.sampled_from("abcde"), min_size=10, max_size=80).map(lambda drawn: [*drawn, "a", "b"])
SEEDS = st.integers(0, 2**40)
QUICK = settings(max_examples=60, deadline=None)


def table_of(labels: list[str], fixed: int = 0, groups: int = 3) -> Table:
    """A table whose last rows repeat the first ones as validation and test rows, `fixed` of each."""
    count = len(labels)
    splits = ["train"] * count + ["validation"] * fixed + ["test"] * fixed
    rows = [*range(count), *range(fixed), *range(fixed)]
    return Table(
        inputs=Texts(f"text {row}" for row in rows), labels=[labels[row] for row in rows],
        groups=[f"site{row % groups}" for row in rows], splits=splits if fixed else None,
        rows=[f"file:{row}" for row in rows],
    )  # fmt: skip


def all_rows(shares: dict[str, ClientRows]) -> list[int]:
    return sorted(
        row for share in shares.values() for part in (share.train, share.validation, share.test) for row in part
    )


def dealt(table: Table, kind: Kind, **options: Any) -> dict[str, ClientRows]:
    """To the clients of a classifier."""
    return partition_rows(table, kind, strata=table.labels, **options)


@QUICK
@given(
    labels=LABELS, kind=st.sampled_from(get_args(Kind)), clients=st.integers(3, 9),
    alpha=st.floats(0.01, 100), fixed=st.integers(0, 9), per_group=st.integers(1, 3),
    shares=st.sampled_from([(0.2, 0.2), (0.0, 0.3), (0.45, 0.5), (0.0, 0.0)]), seed=SEEDS,
)  # fmt: skip
def test_every_example_is_dealt_and_split_exactly_once(
    *, labels: list[str], kind: Kind, clients: int, alpha: float, fixed: int, per_group: int,
    shares: tuple[float, float], seed: int,
) -> None:  # fmt: skip
    table = table_of(labels, fixed)
    hands = dealt(table, kind, clients=clients, alpha=alpha, clients_per_group=per_group, seed=seed)
    assert all_rows(hands) == list(range(len(table)))
    assert all(held.train or not (held.validation or held.test) for held in hands.values())
    for row, split in enumerate(table.splits or []):
        assert sum(row in getattr(held, split) for held in hands.values()) == 1
    validation, test = shares
    parts = {
        client: split_rows(held, table.labels, client, validation=validation, test=test, seed=seed)
        for client, held in hands.items()
    }
    assert all_rows(parts) == list(range(len(table)))
    assert parts == {
        client: split_rows(held, table.labels, client, validation=validation, test=test, seed=seed)
        for client, held in dealt(
            table, kind, clients=clients, alpha=alpha, clients_per_group=per_group, seed=seed
        ).items()
    }
    if kind == "natural" and table.groups is not None:
        for client, held in hands.items():
            rows = held.train + held.validation + held.test
            assert {table.groups[row] for row in rows} <= {client if per_group == 1 else client.rpartition("-")[0]}


@QUICK
@given(LABELS, st.integers(1, 9), SEEDS)
def test_iid_parts_differ_by_one_row_at_most(labels: list[str], clients: int, seed: int) -> None:
    sizes = [len(held.train) for held in dealt(table_of(labels), "iid", clients=clients, seed=seed).values()]
    assert max(sizes) - min(sizes) <= 1


@QUICK
@given(LABELS, st.integers(1, 9), st.integers(1, 5), SEEDS)
def test_classes_gives_at_most_k_labels_to_each_and_every_label_to_someone(
    labels: list[str], clients: int, each: int, seed: int
) -> None:
    known = set(labels)
    table = table_of(labels)
    if each > len(known) or clients * each < len(known):
        with pytest.raises(DataError, match="do not fit"):
            dealt(table, "classes", clients=clients, classes_per_client=each, seed=seed)
        return
    hands = dealt(table, "classes", clients=clients, classes_per_client=each, seed=seed)
    assert all(len({labels[row] for row in held.train}) <= each for held in hands.values())
    assert {labels[row] for held in hands.values() for row in held.train} == known


def test_fixed_rows_follow_the_training_mix() -> None:
    """1,000 rows of two labels, and the same again as test: each client's test mix is its training mix."""
    labels = ["a", "b"] * 500
    table = table_of(labels, fixed=1000)
    for kind in ("dirichlet", "classes", "quantity"):
        for held in dealt(table, kind, clients=5, alpha=0.5, classes_per_client=1, seed=3).values():
            trained, tested = (Counter(table.labels[row] for row in rows) for rows in (held.train, held.test))
            assert all(abs(trained[label] - tested[label]) <= 1 for label in "ab")


def test_a_small_alpha_skews_and_a_large_one_does_not() -> None:
    table = table_of(["a", "b", "c", "d"] * 200)

    def largest(alpha: float) -> float:
        """Mean over clients of the share of a client's most frequent label."""
        hands = [
            held.train for held in dealt(table, "dirichlet", clients=6, alpha=alpha, seed=0).values() if held.train
        ]
        return float(np.mean([max(Counter(table.labels[row] for row in rows).values()) / len(rows) for rows in hands]))

    assert largest(0.05) > 0.7
    assert largest(1000) < 0.3


def test_the_draws_of_a_label_do_not_depend_on_the_other_labels() -> None:
    few = table_of(["a"] * 30 + ["b"] * 30)
    more = table_of(["a"] * 30 + ["b"] * 30 + ["0"] * 30)
    for client, held in dealt(few, "dirichlet", clients=4, seed=5).items():
        assert held.train == [row for row in dealt(more, "dirichlet", clients=4, seed=5)[client].train if row < 60]


def test_clients_are_named_and_ordered() -> None:
    table = table_of(["a", "b"] * 300)
    assert list(dealt(table, "iid", clients=3)) == ["client-00", "client-01", "client-02"]
    assert list(dealt(table, "iid", clients=101))[-1] == "client-100"
    named = replace(table, groups=["w10" if row % 2 else "w2" for row in range(600)])
    assert list(dealt(named, "natural")) == ["w2", "w10"]
    assert list(dealt(named, "natural", clients_per_group=2)) == ["w2-0", "w2-1", "w10-0", "w10-1"]


@QUICK
@given(
    st.integers(0, 50),
    st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda w: sum(w) > 0.1),
    SEEDS,
)
def test_cut_keeps_proportions(count: int, weights: list[float], seed: int) -> None:
    parts = cut(list(range(count)), np.array(weights), np.random.default_rng(seed))
    assert sorted(row for part in parts for row in part) == list(range(count))
    for part, weight in zip(parts, weights, strict=True):
        assert abs(len(part) - count * weight / sum(weights)) <= 1 + 1e-6
        assert part == [] or weight > 0


@QUICK
@given(LABELS, SEEDS)
def test_every_prefix_has_the_mix_of_the_whole(labels: list[str], seed: int) -> None:
    order = interleave(range(len(labels)), labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    total = Counter(labels)
    for size in range(1, len(labels)):
        seen = Counter(labels[row] for row in order[:size])
        assert all(abs(seen[label] - size * total[label] / len(labels)) <= len(total) for label in total)


@QUICK
@given(st.lists(st.sampled_from("abc"), max_size=40), st.floats(0.01, 0.45), st.floats(0.01, 0.45), SEEDS)
def test_splits_are_never_empty_where_they_need_not_be(
    labels: list[str], validation: float, test: float, seed: int
) -> None:
    share = split_rows(
        ClientRows(list(range(len(labels))), [], []), labels, "c", validation=validation, test=test, seed=seed
    )
    assert {labels[row] for row in share.train} == set(labels)
    single = {label for label, count in Counter(labels).items() if count == 1}
    assert not single & {labels[row] for row in share.validation + share.test}
    free = len(labels) - len(set(labels))
    if len(labels) >= 3 and free >= 2:
        assert share.validation
        assert share.test


@QUICK
@given(LABELS, st.integers(1, 20), SEEDS)
def test_caps_draw_from_the_same_parts(labels: list[str], cap: int, seed: int) -> None:
    held = ClientRows(list(range(len(labels))), [], [])
    whole = split_rows(held, labels, "c", validation=0.2, test=0.2, seed=seed)
    capped = split_rows(held, labels, "c", validation=0.2, test=0.2, rows=cap, max_validation=2, max_test=1, seed=seed)
    for part, limit in (("train", cap), ("validation", 2), ("test", 1)):
        rows = getattr(capped, part)
        assert set(rows) <= set(getattr(whole, part))
        assert len(rows) == min(limit, len(getattr(whole, part)))
