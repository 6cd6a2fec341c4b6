"""How a hyper-parameter is declared: a typed, checked, documented field of a frozen dataclass.

    @settings
    class Recipe:
        "Local training."
        lr: Positive = setting(1e-3, "learning rate of AdamW")

A value out of range, of the wrong type or under an unknown name raises `pydantic.ValidationError`, with all
problems at once; `celora.experiment` turns them into a `ConfigError` that says where they stand in the file.
"""

from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


def setting(default: Any, help: str, /, **checks: Any) -> Any:
    """One field: its default, one line of help, and any further checks that `pydantic.Field` knows."""
    return Field(default, description=help, kw_only=True, **checks)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting, Field))
def settings(kind: type[T]) -> type[T]:
    """Make `kind` a frozen, keyword-only dataclass whose values are validated when it is built."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=False))(kind)  # type: ignore[return-value]
