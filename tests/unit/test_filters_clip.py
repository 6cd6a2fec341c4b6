"""celora.filters.clip: the change of what is sent has a bounded norm, its direction stays, the rest is left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms import fedit, local
from celora.core.channel import encode
from celora.errors import PolicyError
from celora.filters.clip import Clip
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


def clip(up: object, down: object, initial: Tensors, norm: float) -> tuple[Any, str]:
    """The record after the stage, and its note."""
    record, state = encode((Clip(norm=norm),), up, down, initial)
    assert not state.stages
    return record, "".join(state.notes)


def change(up: Any, start: Tensors) -> float:
    return float(sum((up.weights[name].double() - d.double()).square().sum() for name, d in start.items()) ** 0.5)


def test_a_change_that_is_too_long_is_scaled_as_a_whole() -> None:
    start = {"q.A": torch.ones(2, 2), "q.B": torch.zeros(3)}
    up = fedit.Up({"q.A": torch.ones(2, 2) + 3.0, "q.B": torch.tensor([0.0, 8.0, 0.0])}, examples=12)
    done, note = clip(up, fedit.Down(start), {}, 5.0)  # ‖change‖ = √(4 · 3² + 8²) = 10
    torch.testing.assert_close(done.weights["q.A"], torch.full((2, 2), 2.5))
    torch.testing.assert_close(done.weights["q.B"], torch.tensor([0.0, 4.0, 0.0]))
    assert done.examples == 12
    assert change(done, start) == pytest.approx(5.0)
    assert note == "clipped by 0.5: change of 2 tensors of norm 10, cosine 1.0000; 0 left alone"


def test_what_is_handed_in_is_not_changed() -> None:
    up = fedit.Up({"q.A": torch.full((4,), 9.0)}, examples=3)
    down = fedit.Down({"q.A": torch.zeros(4)})
    clip(up, down, {}, 1.0)
    assert torch.equal(up.weights["q.A"], torch.full((4,), 9.0))
    assert torch.equal(down.weights["q.A"], torch.zeros(4))


def test_a_change_that_is_short_enough_travels_as_it_is() -> None:
    up = fedit.Up({"q.A": torch.full((4,), 0.5)}, examples=3)
    done, note = clip(up, fedit.Down({"q.A": torch.zeros(4)}), {}, 1.0)
    assert done.weights["q.A"] is up.weights["q.A"] and note.startswith("not clipped: change of 1 tensors of norm 1,")
    still, note = clip(up, fedit.Down(up.weights), {}, 1.0)
    assert still.weights["q.A"] is up.weights["q.A"] and note.startswith("not clipped: change of 1 tensors of norm 0,")


def test_before_the_first_average_the_start_is_what_everybody_starts_from() -> None:
    initial = {"q.A": torch.full((4,), 7.0)}
    done, _ = clip(fedit.Up({"q.A": torch.full((4,), 9.0)}, 3), fedit.Down({}), initial, 2.0)
    torch.testing.assert_close(done.weights["q.A"], torch.full((4,), 8.0))


def test_the_counterpart_is_in_the_field_of_the_same_name_then_in_another_then_in_the_initial_weights() -> None:
    up = Up({name: torch.full((4,), 4.0) for name in "abc"}, None, ())
    down = Down(
        other={"a": torch.full((4,), -99.0), "b": torch.full((4,), 2.0), "c": torch.zeros(5)},
        weights={"a": torch.full((4,), 1.0)},
    )
    initial = {name: torch.full((4,), 3.0) for name in "abc"}
    done, _ = clip(up, down, initial, 1e-9)  # nothing of the change is left: what is sent is the counterpart
    assert {name: round(float(tensor[0]), 4) for name, tensor in done.weights.items()} == {
        "a": 1.0,
        "b": 2.0,
        "c": 3.0,  # the downlink's c has another shape
    }


def test_a_lower_rank_is_compared_with_the_leading_block_of_the_initial_weights() -> None:
    initial = {"q.A": torch.arange(12.0).view(4, 3), "q.B": torch.arange(8.0).view(2, 4)}
    up = fedit.Up({"q.A": initial["q.A"][:2] + 5, "q.B": initial["q.B"][:, :2] + 5}, 3)
    done, note = clip(up, fedit.Down({}), initial, 1e-9)
    torch.testing.assert_close(done.weights["q.A"], initial["q.A"][:2])
    torch.testing.assert_close(done.weights["q.B"], initial["q.B"][:, :2])
    assert note.endswith("0 left alone")


def test_what_has_no_counterpart_is_left_alone_and_counted() -> None:
    summary, own = torch.full((4,), 50.0), torch.full((4,), 60.0)
    up = Up({"a": torch.full((4,), 4.0), "mine": own, "n": torch.tensor([9])}, summary, (b"cipher",))
    done, note = clip(up, Down({}, {"a": torch.zeros(4), "n": torch.tensor([1])}), {}, 1.0)
    assert done.summary is summary
    assert done.cipher == (b"cipher",)
    assert done.weights["mine"] is own
    assert int(done.weights["n"]) == 9  # whole numbers have no direction
    assert note == "clipped by 0.12: change of 1 tensors of norm 8, cosine 1.0000; 4 left alone"


def test_the_dtype_stays_and_the_norm_is_of_float64() -> None:
    up = fedit.Up({"q.A": torch.full((10_000,), 1.0, dtype=torch.bfloat16)}, 3)
    done, note = clip(up, fedit.Down({"q.A": torch.zeros(10_000, dtype=torch.bfloat16)}), {}, 10.0)
    assert done.weights["q.A"].dtype == torch.bfloat16
    assert note.startswith("clipped by 0.1: change of 1 tensors of norm 100,")


def test_clips_in_turn_leave_a_note_each() -> None:
    channel = Clip(norm=2.0), Clip(norm=1.0)
    up: Any = fedit.Up({"q.A": torch.full((4,), 2.0)}, 12)
    up, state = encode(channel, up, fedit.Down({"q.A": torch.zeros(4)}), {})
    torch.testing.assert_close(up.weights["q.A"], torch.full((4,), 0.5))
    assert [note.partition(":")[0] for note in state.notes] == ["clipped by 0.5", "clipped by 0.5"]


def test_a_filter_that_cannot_be_applied_sends_nothing() -> None:
    up = Up({}, torch.ones(3), ())
    with pytest.raises(PolicyError) as refused:
        clip(up, Down({}, {}), {"a": torch.ones(3)}, 1.0)
    assert str(refused.value) == (
        "test_filters_clip.Up is not sent: the filter clip found no tensor with a counterpart in what was received, "
        "expected at least one; choose another algorithm, or leave out the filter ([[filters]])"
    )


def test_where_nothing_is_sent_that_has_a_direction_nothing_need_be_clipped() -> None:
    up, empty = local.Up(), Up({}, None, ())
    assert clip(up, local.Down(), {}, 1.0) == (up, "")
    assert clip(empty, Down({}, {}), {}, 1.0) == (empty, "")
    whole = Up({"n": torch.tensor([9])}, None, (b"cipher",))
    assert clip(whole, Down({}, {}), {}, 1.0) == (whole, "")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_change_that_is_not_finite_is_refused(bad: float, side: str) -> None:
    good, broken = torch.zeros(4), torch.tensor([0.0, bad, 0.0, 0.0])
    up, down = (broken, good) if side == "up" else (good, broken)
    with pytest.raises(PolicyError) as refused:
        clip(fedit.Up({"q.A": up}, 3), fedit.Down({"q.A": down}), {}, 1.0)
    assert str(refused.value) == (
        "fedit.Up is not sent: the filter clip found NaN or infinity in the change, expected finite numbers; lower "
        "train.lr, or leave out the filter ([[filters]])"
    )


def test_the_largest_finite_numbers_are_no_infinity() -> None:
    most = torch.full((4,), torch.finfo(torch.float32).max)
    done, _ = clip(fedit.Up({"q.A": most}, 3), fedit.Down({"q.A": -most}), {}, 1.0)
    assert bool(done.weights["q.A"].isfinite().all())


def test_a_clip_is_declared_with_its_norm() -> None:
    assert Clip(norm=2).norm == 2.0
    for wrong in ({}, {"norm": 0.0}, {"norm": True}, {"norm": "1"}, {"norm": 1.0, "name": "clip"}):
        with pytest.raises(ValueError, match="validation error"):
            Clip(**wrong)  # type: ignore[arg-type]


def test_a_smaller_norm_meets_a_larger_one() -> None:
    assert Clip(norm=1.0).meets(Clip(norm=1.0)) and Clip(norm=0.5).meets(Clip(norm=1.0))
    assert not Clip(norm=2.0).meets(Clip(norm=1.0))
