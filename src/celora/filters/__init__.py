"""Filters: the stages that an experiment may name and a site's policy may require, one a file.

    [[filters]]
    name = "clip"
    norm = 1.0

    [[filters]]
    name = "quantise"
    bits = 8

They are applied to what is sent, in this order (`celora.core.channel`).
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import ValidationError

from celora.core.channel import Channel, Stage
from celora.fields import did_you_mean, error_lines
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise

FILTERS: Mapping[str, type[Stage]] = {"clip": Clip, "quantise": Quantise}
"""Name in a file -> the stage."""


def read_filters(found: Any, problems: list[str]) -> Channel:
    """The stages under `[[filters]]`; what is wrong with them is added to `problems`."""
    if not isinstance(found, list):
        problems.append(f"filters: found {found!r}, expected tables under [[filters]]")
        return ()
    stages = [_read(f"filters.{number}", table, problems) for number, table in enumerate(found, 1)]
    return tuple(stage for stage in stages if stage is not None)


def filter_tables(channel: Channel) -> list[dict[str, Any]]:
    """The tables from which `read_filters` reads these stages."""
    names = {kind: name for name, kind in FILTERS.items()}
    return [{"name": names[type(stage)], **asdict(stage)} for stage in channel]  # type: ignore[call-overload]


def _read(place: str, table: Any, problems: list[str]) -> Stage | None:
    if not isinstance(table, dict):
        problems.append(f"{place}: found {table!r}, expected a table")
        return None
    name, known = table.get("name", ""), " or ".join(map(repr, FILTERS))
    if not isinstance(name, str) or name not in FILTERS:
        found = f"found {name!r}" if "name" in table else "missing"
        problems.append(f"{place}.name: {found}, expected {known}{did_you_mean(str(name), FILTERS)}")
        return None
    kind: Any = FILTERS[name]
    try:
        stage: Stage = kind(**{key: value for key, value in table.items() if key != "name"})
    except ValidationError as error:
        problems += error_lines(error, place, ["name", *(field.name for field in fields(kind))])
        return None
    return stage
