"""celora.site.filters: the change of what is sent has a bounded norm, its direction stays, the rest is left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms import fedit, local
from celora.errors import PolicyError
from celora.site.filters import Clip, clip, is_empty
from celora.tensors import Tensors
from celora.wire import record


@record
class Down:
    other: Tensors
    weights: Tensors


@record
class Up:
    weights: Tensors
    summary: Tensor | None
    cipher: tuple[bytes, ...]


def change(up: Any, start: Tensors) -> float:
    return float(sum((up.weights[name].double() - d.double()).square().sum() for name, d in start.items()) ** 0.5)


def test_a_change_that_is_too_long_is_scaled_as_a_whole() -> None:
    start = {"q.A": torch.ones(2, 2), "q.B": torch.zeros(3)}
    up = fedit.Up({"q.A": torch.ones(2, 2) + 3.0, "q.B": torch.tensor([0.0, 8.0, 0.0])}, examples=12)
    done = clip(up, fedit.Down(start), {}, 5.0)  # ‖change‖ = √(4 · 3² + 8²) = 10
    assert (done.norm, done.factor) == (10.0, 0.5)
    assert done.cosine == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(done.record.weights["q.A"], torch.full((2, 2), 2.5))
    torch.testing.assert_close(done.record.weights["q.B"], torch.tensor([0.0, 4.0, 0.0]))
    assert done.record.examples == 12
    assert change(done.record, start) == pytest.approx(5.0)
    assert done.note == "clipped by 0.5: change of 2 tensors of norm 10, cosine 1.0000; 0 left alone"


def test_what_is_handed_in_is_not_changed() -> None:
    up = fedit.Up({"q.A": torch.full((4,), 9.0)}, examples=3)
    down = fedit.Down({"q.A": torch.zeros(4)})
    clip(up, down, {}, 1.0)
    assert torch.equal(up.weights["q.A"], torch.full((4,), 9.0))
    assert torch.equal(down.weights["q.A"], torch.zeros(4))


def test_a_change_that_is_short_enough_travels_as_it_is() -> None:
    up = fedit.Up({"q.A": torch.full((4,), 0.5)}, examples=3)
    done = clip(up, fedit.Down({"q.A": torch.zeros(4)}), {}, 1.0)
    assert done.record is up
    assert (done.factor, done.note[:11]) == (1.0, "not clipped")
    assert clip(up, fedit.Down(up.weights), {}, 1.0).record is up  # no change at all


def test_before_the_first_average_the_start_is_what_everybody_starts_from() -> None:
    initial = {"q.A": torch.full((4,), 7.0)}
    done = clip(fedit.Up({"q.A": torch.full((4,), 9.0)}, 3), fedit.Down({}), initial, 2.0)
    torch.testing.assert_close(done.record.weights["q.A"], torch.full((4,), 8.0))


def test_the_counterpart_is_in_the_field_of_the_same_name_then_in_another_then_in_the_initial_weights() -> None:
    up = Up({name: torch.full((4,), 4.0) for name in "abc"}, None, ())
    down = Down(
        other={"a": torch.full((4,), -99.0), "b": torch.full((4,), 2.0), "c": torch.zeros(5)},
        weights={"a": torch.full((4,), 1.0)},
    )
    initial = {name: torch.full((4,), 3.0) for name in "abc"}
    done = clip(up, down, initial, 1e-9)  # nothing of the change is left: what is sent is the counterpart
    assert {name: round(float(tensor[0]), 4) for name, tensor in done.record.weights.items()} == {
        "a": 1.0,
        "b": 2.0,
        "c": 3.0,  # the downlink's c has another shape
    }


def test_what_has_no_counterpart_is_left_alone_and_counted() -> None:
    summary, own = torch.full((4,), 50.0), torch.full((4,), 60.0)
    up = Up({"a": torch.full((4,), 4.0), "mine": own, "n": torch.tensor([9])}, summary, (b"cipher",))
    done = clip(up, Down({}, {"a": torch.zeros(4), "n": torch.tensor([1])}), {}, 1.0)
    assert done.record.summary is summary
    assert done.record.cipher == (b"cipher",)
    assert done.record.weights["mine"] is own
    assert int(done.record.weights["n"]) == 9  # whole numbers have no direction
    assert done.tensors == (1, 2)
    assert done.norm == 8.0


def test_the_dtype_stays_and_the_norm_is_of_float64() -> None:
    up = fedit.Up({"q.A": torch.full((10_000,), 1.0, dtype=torch.bfloat16)}, 3)
    done = clip(up, fedit.Down({"q.A": torch.zeros(10_000, dtype=torch.bfloat16)}), {}, 10.0)
    assert done.record.weights["q.A"].dtype == torch.bfloat16
    assert done.norm == 100.0
    assert done.factor == 0.1


def test_a_filter_that_cannot_be_applied_sends_nothing() -> None:
    up = Up({}, torch.ones(3), ())
    with pytest.raises(PolicyError) as refused:
        clip(up, Down({}, {}), {"a": torch.ones(3)}, 1.0)
    assert str(refused.value) == (
        "test_site_filters.Up does not leave this site: its policy requires the filter clip, which found no tensor "
        "with a counterpart in what was received, expected at least one; choose another algorithm, or change the "
        "policy at the site ([[filters]])"
    )


def test_where_nothing_is_sent_nothing_need_be_clipped() -> None:
    up = local.Up()
    assert clip(up, local.Down(), {}, 1.0).record is up
    empty = Up({}, None, ())
    assert clip(empty, Down({}, {}), {}, 1.0).record is empty


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_change_that_is_not_finite_is_refused(bad: float, side: str) -> None:
    good, broken = torch.zeros(4), torch.tensor([0.0, bad, 0.0, 0.0])
    up, down = (broken, good) if side == "up" else (good, broken)
    with pytest.raises(PolicyError) as refused:
        clip(fedit.Up({"q.A": up}, 3), fedit.Down({"q.A": down}), {}, 1.0)
    assert str(refused.value) == (
        "fedit.Up does not leave this site: its policy requires the filter clip, which found NaN or infinity in the "
        "change, expected finite numbers; lower train.lr, or change the policy at the site ([[filters]])"
    )


def test_the_largest_finite_numbers_are_no_infinity() -> None:
    most = torch.full((4,), torch.finfo(torch.float32).max)
    done = clip(fedit.Up({"q.A": most}, 3), fedit.Down({"q.A": -most}), {}, 1.0)
    assert bool(done.record.weights["q.A"].isfinite().all())


def test_a_filter_is_declared_with_its_name_and_its_norm() -> None:
    assert Clip(name="clip", norm=2).norm == 2.0
    for wrong in ({"norm": 1.0}, {"name": "clip"}, {"name": "clip", "norm": 0.0}, {"name": "clip", "norm": True}):
        with pytest.raises(ValueError, match="validation error"):
            Clip(**wrong)  # type: ignore[arg-type]


def test_what_is_empty() -> None:
    assert all(is_empty(value) for value in (None, "", b"", (), {}))
    assert not any(is_empty(value) for value in (0, 0.0, False, "x", b"x", (0,), {"a": 0}, torch.zeros(0), local.Up()))
