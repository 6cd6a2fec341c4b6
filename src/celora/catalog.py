"""What `celora list` tells of the algorithms, read off their `info`, records and fields."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import getdoc
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from celora.algorithms.lookup import known, lookup, package
from celora.core.algorithm import AlgorithmInfo, AnyAlgorithm
from celora.errors import ConfigError
from celora.tensors import example

Description = dict[str, Any]
MIXED = "*"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def describe(names: Sequence[str]) -> list[Description]:
    """The named algorithms, or all of them: those of the table and those that installed packages offer.

    Raises:
        ConfigError: with every problem found; see `celora.algorithms.lookup`.
    """
    found, problems = list[Description](), list[str]()
    for name in names or known():
        try:
            found.append(_entry(name, lookup(name)))
        except ConfigError as error:
            problems += [f"algorithm: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return found


def table(entries: Sequence[Description]) -> Table:
    """A row for each algorithm: what is trained, what goes up and comes down, what stays, what the server keeps."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    columns = ("algorithm", "trained", "up", "down", "stays at the client", "server keeps", "numbers up a layer")
    for number, column in enumerate(columns):
        found.add_column(column, no_wrap=number == 0, overflow="fold")
    for e in entries:
        name = e["name"] + (f" {MIXED}" if _is_mixed(e) else "") + (f" ({e['package']})" if e["package"] else "")
        stays, kept = (e[key] for key in ("keeps", "remembers"))
        found.add_row(*map(Text, (name, e["trains"], _up(e), _down(e), stays, kept, e["uplink"])))
    mixed = f"\n{MIXED} clients may have ranks of their own (adapter.ranks)." if any(map(_is_mixed, entries)) else ""
    found.caption = Text(
        "Numbers up a layer: what a client sends in a round for one adapted matrix (d inputs, k outputs) at rank r, "
        f"without a head. Whether the head travels is a setting, algorithm.head; this is its default.{mixed}",
        justify="left",
    )
    return found


def page(entry: Description) -> Iterator[RenderableType]:
    """All about one algorithm, its settings included."""
    yield Text(f"{entry['name']}: {entry['about']}", style="bold")
    facts = {
        "package": entry["package"] or "celora",
        "paper": " ".join((entry["title"], entry["link"])).strip(),
        "update": entry["update"],
        "trained": entry["trains"],
        "up": f"{_up(entry)}; numbers a layer and round (d inputs, k outputs, rank r; no head): {entry['uplink']}",
        "down": _down(entry),
        "stays": entry["keeps"],
        "server keeps": entry["remembers"],
        "data summary": "goes up, and is counted apart" if entry["data_summary"] else "none",
        "who learned from whom": "in the run folder, similarity/" if entry["mixing_matrix"] else "not written",
        "needs of the task": ", ".join(entry["needs"]) or "nothing",
        "ranks": "each client may have its own (adapter.ranks)" if entry["mixed_ranks"] else "one for all clients",
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


def _is_mixed(entry: Description) -> bool:
    return bool(entry["mixed_ranks"])


def _first(kind: type) -> str:
    """The first paragraph of a docstring."""
    return (getdoc(kind) or "").partition("\n\n")[0]


def _up(entry: Description) -> str:
    return _with_head(entry["sends"], entry)


def _down(entry: Description) -> str:
    return _with_head(entry["gets"], entry)


def _with_head(letters: str, entry: Description) -> str:
    """The letters of its `info`, and the head where it travels by default."""
    return letters if "head" in letters or "head" not in entry["travels"] else f"{letters}, head"


def _entry(name: str, kind: type[Any]) -> Description:
    algorithm: AnyAlgorithm = kind()
    info: AlgorithmInfo = kind.info
    all_parts = [*algorithm.family.parts(1, 1, 1), "head"]
    travels = [part for part in all_parts if algorithm.shares(example(part))]
    fields: Mapping[str, Mapping[str, Any]] = TypeAdapter(kind).json_schema()["properties"]
    return {
        "name": name,
        "package": package(name),
        "about": getdoc(kind),
        "title": info.title,
        "link": info.link,
        "family": algorithm.family.name,
        "update": algorithm.family.update,
        "head": algorithm.head,
        "travels": travels,
        "stays": [part for part in all_parts if part not in travels],
        "trains": info.trains,
        "sends": info.sends,
        "gets": info.gets,
        "keeps": info.keeps,
        "remembers": info.remembers,
        "uplink": info.uplink,
        "needs": sorted(info.needs),
        "mixed_ranks": info.mixed_ranks,
        "partial": info.partial,
        "data_summary": info.data_summary,
        "mixing_matrix": info.mixing_matrix,
        "up": _first(info.up),
        "down": _first(info.down),
        "local": _first(info.local),
        "private_bases": info.private_bases,
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
