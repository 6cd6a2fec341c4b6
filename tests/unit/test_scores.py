"""celora.track.scores: the six numbers against their definitions, and what is left out of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celora.core.metrics import LOSS
from celora.track.scores import lifts, metrics

SCORES = st.dictionaries(st.text(min_size=1), st.floats(0, 1), min_size=1, max_size=40)


@pytest.mark.parametrize(("clients", "lowest"), [(1, 1), (9, 1), (19, 1), (20, 2), (35, 3)])
def test_the_worst_decile_is_the_mean_of_a_tenth_and_at_least_of_one(clients: int, lowest: int) -> None:
    scores = {f"c{i}": i / 100 for i in range(clients)}
    assert metrics(scores, {})["worst_decile"] == pytest.approx(sum(range(lowest)) / lowest / 100)


def test_clients_without_a_score_or_a_twin_are_left_out() -> None:
    found = metrics({"a": 0.5, "b": None, "c": math.nan, "d": 1.0}, {"a": 1, "b": 100, "d": 3}, {"a": 0.75, "b": 0.1})
    assert found["mean"] == 0.75
    assert found["weighted_mean"] == 0.875
    assert (found["lift_mean"], found["harmed"]) == (-0.25, 1.0)


def test_equal_to_the_twin_is_not_harmed() -> None:
    assert metrics({"a": 0.5}, {"a": 1}, {"a": 0.5})["harmed"] == 0.0


def test_without_rows_or_clients_there_is_no_number_and_no_nan() -> None:
    assert set(metrics({}, {}).values()) == {None}
    assert metrics({"a": 0.5}, {"a": 0})["weighted_mean"] is None


@given(SCORES)
def test_means_stay_between_the_lowest_and_the_highest_score(scores: dict[str, float]) -> None:
    found = metrics(scores, dict.fromkeys(scores, 7), dict.fromkeys(scores, 0.5))
    low, high = min(scores.values()), max(scores.values())
    for name in ("mean", "weighted_mean", "worst_decile"):
        value = found[name]
        assert value is not None
        assert low - 1e-9 <= value <= high + 1e-9
    assert found["harmed"] == sum(gain < 0 for gain in lifts(scores, dict.fromkeys(scores, 0.5)).values()) / len(scores)


def test_where_lower_is_better_gains_are_falls_and_the_worst_are_the_highest() -> None:
    scores, alone = {f"c{i}": float(i) for i in range(20)}, {f"c{i}": 5.0 for i in range(20)}
    assert lifts({"a": 1.5, "b": 3.0}, {"a": 2.0, "b": 2.0}, LOSS) == {"a": 0.5, "b": -1.0}
    found = metrics(scores, {}, alone, LOSS)
    assert found["worst_decile"] == 18.5
    assert (found["lift_mean"], found["harmed"]) == (5.0 - 9.5, 14 / 20)
