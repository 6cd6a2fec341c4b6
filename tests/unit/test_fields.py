"""celora.fields: a hyper-parameter is typed, checked and documented where it stands."""

import dataclasses
from math import inf, nan
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from celora.algorithms import ALGORITHMS
from celora.core.learner import Recipe
from celora.core.messages import Plan
from celora.fields import Count, Fraction, NonNegative, Positive, Whole, setting, settings


@settings
class Options:
    """Some of each kind."""

    positive: Positive = setting(1.0, "more than 0")
    not_negative: NonNegative = setting(0.0, "0 or more")
    share: Fraction = setting(0.5, "0 to 1")
    count: Count = setting(1, "1 or more")
    whole: Whole = setting(0, "0 or more")
    choice: Literal["a", "b"] = setting("a", "one of two")
    even: int = setting(2, "a multiple of two", multiple_of=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("positive", v) for v in (0, -1, inf, nan, "x", None)],
        *[("not_negative", v) for v in (-1e-9, inf, nan)],
        *[("share", v) for v in (-0.1, 1.1, inf, nan)],
        *[("count", v) for v in (0, 2.5, "two")],
        *[("whole", v) for v in (-1, 0.5)],
        *[("choice", v) for v in ("c", "A", None)],
        ("even", 3),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        Options(**{name: value})
    assert [error["loc"] for error in refused.value.errors()] == [(name,)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("positive", 1e-9), ("not_negative", 0), ("share", 0), ("share", 1), ("count", 1), ("whole", 0), ("choice", "b")],
)
def test_the_ends_of_a_range_belong_to_it(name: str, value: Any) -> None:
    assert getattr(Options(**{name: value}), name) == value


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as refused:
        Options(positive=-1, share=2, choice="z", posit=1)  # type: ignore[call-arg,arg-type]
    assert {error["loc"][0] for error in refused.value.errors()} == {"positive", "share", "choice", "posit"}


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().count = 2  # type: ignore[misc]


def test_settings_are_keyword_only() -> None:
    with pytest.raises(ValidationError, match="positional"):
        Options(1.0)  # type: ignore[misc]


def test_a_changed_copy_is_checked_again() -> None:
    assert dataclasses.replace(Options(), count=3).count == 3
    with pytest.raises(ValidationError):
        dataclasses.replace(Options(), count=0)


@pytest.mark.parametrize("kind", [Plan, Recipe, *ALGORITHMS.values()], ids=lambda kind: kind.__name__)
def test_every_setting_has_a_default_that_passes_and_one_line_of_help(kind: type[Any]) -> None:
    value = kind()
    assert dataclasses.fields(value)
    for name, field in kind.__pydantic_fields__.items():
        assert field.description, name
        assert "\n" not in field.description, name
        changed = dataclasses.replace(value, **{name: getattr(value, name)})
        assert getattr(changed, name) == getattr(value, name)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Plan, {"rounds": 0}),
        (Plan, {"fraction": 0}),
        (Plan, {"fraction": 1.01}),
        (Plan, {"quorum": 0}),
        (Plan, {"deadline": 0}),
        (Plan, {"evaluate_every": 0}),
        (Plan, {"seed": -1}),
        (Recipe, {"lr": 0}),
        (Recipe, {"epochs": 0}),
        (Recipe, {"steps": 0}),
        (Recipe, {"batch_size": 0}),
        (Recipe, {"clip": -1}),
        (Recipe, {"weight_decay": -0.1}),
        (Recipe, {"decay": "cosine"}),
    ],
)
def test_a_plan_and_a_recipe_refuse_what_makes_no_sense(kind: type[Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**wrong)


@pytest.mark.parametrize("name", ["data_share", "label_cost", "temperature", "self_share"])
def test_ce_lora_refuses_numbers_that_are_none(name: str) -> None:
    for number in (inf, nan):
        with pytest.raises(ValidationError):
            ALGORITHMS["ce-lora"](**{name: number})
