"""What `celora list` tells of the algorithms, read off their cards, records and fields."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from inspect import getdoc
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from celora.algorithms import ALGORITHMS
from celora.core.algorithm import AnyAlgorithm, Card
from celora.errors import ConfigError

Entry = dict[str, Any]
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def describe(names: Sequence[str]) -> list[Entry]:
    """The named algorithms, or all of them.

    Raises:
        ConfigError: for names that there are not.
    """
    problems = [
        f"algorithm {name!r}: there is none of this name. Did you mean {close[0]!r}?"
        if (close := difflib.get_close_matches(name, ALGORITHMS, n=1))
        else f"algorithm {name!r}: there is none of this name; expected one of {', '.join(ALGORITHMS)}"
        for name in names
        if name not in ALGORITHMS
    ]
    if problems:
        raise ConfigError(problems)
    return [_entry(name) for name in names or ALGORITHMS]


def table(entries: Sequence[Entry]) -> Table:
    """A row for each algorithm."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("algorithm", "what it is", "update", "travels", "stays", "head", "secret bases"):
        found.add_column(column, no_wrap=column != "what it is")
    for e in entries:
        parts = (" ".join(e[key]) or "nothing" for key in ("travels", "stays"))
        bases = "allowed" if e["private_bases"] else "no"
        found.add_row(*map(Text, (e["name"], e["about"], e["update"], *parts, e["head"], bases)))
    return found


def page(entry: Entry) -> Iterator[RenderableType]:
    """All about one algorithm, its settings included."""
    yield Text(f"{entry['name']}: {entry['about']}", style="bold")
    facts = {
        "paper": " ".join((entry["title"], entry["link"])).strip(),
        "update": entry["update"],
        "travels": " ".join(entry["travels"]) or "nothing",
        "stays": " ".join(entry["stays"]) or "nothing",
        "client sends": entry["up"],
        "client gets": entry["down"],
        "client keeps": entry["local"],
    }
    about = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for name, fact in facts.items():
        about.add_row(Text(name), Text(fact, overflow="fold"))
    yield Padding(about, (0, 0, 0, 2))
    settings = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("setting", "default", "allowed", "meaning"):
        settings.add_column(column, no_wrap=column == "setting", overflow="fold")
    for s in entry["settings"]:
        settings.add_row(*map(Text, (f"algorithm.{s['name']}", _toml(s["default"]), s["allowed"], s["help"])))
    yield settings


def _entry(name: str) -> Entry:
    kind = ALGORITHMS[name]
    algorithm: AnyAlgorithm = kind()
    card: Card = kind.card
    all_parts = [*algorithm.family.parts(1, 1, 1), "head"]
    travels = [part for part in all_parts if algorithm.shares("head.weight" if part == "head" else f"layer.{part}")]
    fields: Mapping[str, Mapping[str, Any]] = TypeAdapter(kind).json_schema()["properties"]
    return {
        "name": name,
        "about": getdoc(kind),
        "title": card.title,
        "link": card.link,
        "family": algorithm.family.name,
        "update": algorithm.family.update,
        "head": algorithm.head,
        "travels": travels,
        "stays": [part for part in all_parts if part not in travels],
        "up": getdoc(card.up),
        "down": getdoc(card.down),
        "local": getdoc(card.local),
        "private_bases": card.private_bases,
        "settings": [
            {
                "name": key,
                "default": field["default"],
                "allowed": _allowed(field),
                "help": field["description"],
            }
            for key, field in fields.items()
        ],
    }


def _allowed(field: Mapping[str, Any]) -> str:
    """The values a JSON schema admits, in words."""
    if "anyOf" in field:
        return " or ".join(_allowed(choice) for choice in field["anyOf"])
    if "enum" in field:
        return ", ".join(_toml(value) for value in field["enum"])
    if "const" in field:
        return _toml(field["const"])
    kind = {"boolean": "true, false", "integer": "whole number", "null": "left out"}.get(field["type"], field["type"])
    bounds = " and ".join(f"{sign} {field[name]}" for name, sign in BOUNDS.items() if name in field)
    return f"{kind} {bounds}".strip()


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
