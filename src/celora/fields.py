"""How a hyper-parameter is declared: a typed, checked, documented field of a frozen dataclass.

    @settings
    class Recipe:
        "Local training."
        lr: Positive = setting(1e-3, "learning rate of AdamW")

A value out of range, of the wrong type or under an unknown name raises `pydantic.ValidationError`, with all
problems at once; `error_lines` puts them into words, for a `ConfigError` that says where they stand in the file.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


def setting(default: Any, help: str, /, **checks: Any) -> Any:
    """One field: its default, one line of help, and any further checks that `pydantic.Field` knows."""
    return Field(default, description=help, kw_only=True, **checks)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting, Field))
def settings(kind: type[T]) -> type[T]:
    """Make `kind` a frozen, keyword-only dataclass whose values are validated when it is built."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))(kind)  # type: ignore[return-value]


def error_lines(error: ValidationError, section: str, known: Iterable[str]) -> list[str]:
    """One line for each mistake: where it is, what was found, what was expected, what may have been meant.

    Args:
        section: where the fields stand in the file.
        known: their names.
    """
    allowed, lines = list(known), list[str]()
    for problem in error.errors():
        path = ".".join(str(step) for step in (section, *problem["loc"]))
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            key = str(problem["loc"][-1])
            lines.append(f"{path}: unknown key{did_you_mean(key, allowed)} (allowed: {', '.join(allowed)})")
        elif problem["type"] == "missing":
            lines.append(f"{path}: missing, expected a value")
        elif problem["type"] == "value_error":
            lines.append(f"{path}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            message = problem["msg"].removeprefix("Input should be ")
            words = message.replace("'", "").replace(",", "").split() if problem["type"] == "literal_error" else []
            hint = did_you_mean(str(problem["input"]), words)
            lines.append(f"{path}: found {problem['input']!r}, expected {message}{hint}")
    return lines


def unknown(found: Iterable[str], known: Iterable[str], prefix: str) -> list[str]:
    """One line for each key that was found and is not known."""
    allowed = list(known)
    return [
        f"{prefix}{key}: unknown key{did_you_mean(key, allowed)} (allowed: {', '.join(allowed)})"
        for key in found
        if key not in allowed
    ]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word nearest to this one, as a question; nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close and close[0] != word else ""
