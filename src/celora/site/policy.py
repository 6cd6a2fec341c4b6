"""The policy: what a site lets leave, in a file of its own that no server can override.

    version = 1

    [leaves]                                  # without this section: whatever the algorithm declares
    "ce_lora.Up" = ["core", "examples"]       # so the data summary stays
    "messages.Reply" = ["frame", "scores", "error"]
    "remote.ClientFacts" = ["rows", "proposal", "baseline", "data", "backbone", "version"]

    [budget]
    round_bytes = 1_000_000
    total_bytes = 100_000_000

    [disclosure]
    floor = 10

    [algorithms]                              # without this section: those of celora's own table
    allow = ["fedit", "ce-lora"]              # others by name, or as "package.module:Class": their code runs here

    [[filters]]
    name = "clip"
    norm = 1.0

A filter that the policy names is required (`celora.filters`). The experiment may name it, at least as strong; if it
does not, the site applies the filter itself, or takes no part if the server would have to undo it.

What a policy refuses is a `PolicyError`. Its text may travel to the server in place of what was refused, so it tells of
names, types and limits, and never of content.
"""

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import InstanceOf, ValidationError

from celora.algorithms import ALGORITHMS
from celora.algorithms.lookup import lookup
from celora.core.algorithm import AnyAlgorithm
from celora.core.channel import Channel, Stage
from celora.core.messages import Reply
from celora.engines.remote import ClientFacts
from celora.errors import ConfigError, PolicyError
from celora.fields import Count, did_you_mean, error_lines, setting, settings, unknown
from celora.filters import read_filters
from celora.marks import DisclosureFloor, marked
from celora.site.ledger import Ledger
from celora.wire.records import name_of

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "budget": ("round_bytes", "total_bytes"),
    "disclosure": ("floor",),
    "algorithms": ("allow",),
}
"""Section of the file -> the policy's fields in it."""


@settings
class Policy:
    """What may leave; by default whatever the algorithm declares, if enough rows are behind it."""

    leaves: Mapping[str, tuple[str, ...]] | None = setting(None, "record -> its fields that may leave; None: all")
    round_bytes: Count | None = setting(None, "bytes of frames that may leave in a round of a federation", strict=True)
    total_bytes: Count | None = setting(None, "bytes of frames that may leave in all", strict=True)
    floor: Count = setting(10, "fewest training rows behind anything that leaves", strict=True)
    allow: tuple[str, ...] | None = setting(None, "algorithms that may run here; None: those of celora's own table")
    filters: tuple[InstanceOf[Stage], ...] = setting((), "what must be done to what the site sends, in this order")

    def permit(self, name: str) -> None:
        """May this algorithm run here? Asked before a module that the name may speak of is imported.

        Raises:
            PolicyError: if it is not among those that the policy lists.
        """
        if name in (ALGORITHMS if self.allow is None else self.allow):
            return
        own = "an algorithm of celora's own table" if self.allow is None else ", ".join(self.allow) or "none"
        raise PolicyError(
            f"this site does not take part: found algorithm.name = {name!r}, expected {own}; choose another algorithm, "
            "or change the policy at the site ([algorithms] allow)"
        )

    def accept(self, algorithm: AnyAlgorithm, rows: int) -> None:
        """May this site take part? Asked before anything is told or trained.

        Args:
            rows: training rows.

        Raises:
            PolicyError: if they are fewer than the floor, if the algorithm would tell of fewer, or if the record that
                it sends may not leave.
        """
        if rows < self.floor:  # how many there are is not for the server to know
            raise PolicyError(
                "this site does not take part: found fewer training rows than its policy's disclosure.floor, expected "
                f"at least {self.floor}; add rows, or change the policy at the site"
            )
        for name in marked(type(algorithm), DisclosureFloor):
            if (least := getattr(algorithm, name)) < self.floor:
                raise PolicyError(
                    f"this site does not take part: found algorithm.{name} = {least}, expected at least {self.floor}, "
                    f"its policy's disclosure.floor; raise {name} in the experiment, or change the policy at the site"
                )
        if _fields(algorithm.info.up):
            self._allowed(name_of(algorithm.info.up))

    def channel(self, declared: Channel) -> Channel:
        """The stages of a job at this site: the experiment's, and those the policy requires that are not among them.

        The site's own come after the experiment's, but before one that packs, which ends the channel.

        Raises:
            PolicyError: if the experiment lacks a required stage that only both ends can have.
        """
        own = [required for required in self.filters if not any(stage.meets(required) for stage in declared)]
        for required in own:
            if required.packs:
                found = ", ".join(stage.describe() for stage in declared) or "none"
                raise PolicyError(
                    f"this site does not take part: its policy requires the filter '{required.describe()}', found "
                    f"{found}; name it in the experiment ([[filters]]), or change the policy at the site"
                )
        first = [stage for stage in declared if not stage.packs]
        return (*first, *own, *(stage for stage in declared if stage.packs))

    def admit(self, kind: str, value: object) -> None:
        """May this record leave? Asked before it is packed. A record that has no fields may.

        Args:
            kind: its name, `name_of(type(value))`.

        Raises:
            PolicyError: naming the record, or each of its fields that is filled and may not leave.
        """
        held = {field.name: getattr(value, field.name) for field in _fields(value)}
        allowed = self._allowed(kind) if held else None
        if allowed is None:
            return
        refused = [name for name, content in held.items() if name not in allowed and not is_empty(content)]
        if refused:
            found = ", ".join(f"{name} ({type(held[name]).__name__})" for name in refused)
            raise PolicyError(
                f"{kind} does not leave this site: found {found}, expected {', '.join(allowed) or 'empty fields'}: "
                "its policy lets no more of it leave; change the policy at the site ([leaves])"
            )

    def _allowed(self, kind: str) -> tuple[str, ...] | None:
        """The fields of a record that may leave; None: all."""
        if self.leaves is None:
            return None
        if kind not in self.leaves:
            named = f"only {', '.join(self.leaves)}" if self.leaves else "nothing"
            raise PolicyError(
                f"{kind} does not leave this site: its policy lets {named} leave; change the policy at the site "
                "([leaves])"
            )
        return self.leaves[kind]

    def afford(self, size: int, round: int, ledger: Ledger, federation: str) -> None:
        """May a frame of this many bytes leave, after all that has left? Asked before it is entered in the ledger.

        Raises:
            PolicyError: if it would exceed a budget.
        """
        in_round, ever = ledger.sent(federation, round), ledger.total()
        for limit, before, name, when in (
            (self.round_bytes, in_round, "round_bytes", f"in round {round} of federation {federation!r}"),
            (self.total_bytes, ever, "total_bytes", "so far"),
        ):
            if limit is not None and before + size > limit:
                raise PolicyError(
                    f"a frame does not leave this site: found {size:,} bytes after {before:,} {when}, expected at most "
                    f"{limit:,} together, its policy's budget.{name}; send less (a lower rank, another algorithm), or "
                    "change the policy at the site"
                )

    def describe(self) -> list[str]:
        """The policy in plain words, a line each."""
        floor = f"fewest training rows behind anything that leaves: {self.floor}"
        if self == NO_FILE:
            return [f"no policy file: whatever the algorithm declares may leave, any number of bytes; {floor}"]
        leaves = "whatever the algorithm declares"
        if self.leaves is not None:
            named = [f"{kind} ({', '.join(names) or 'empty'})" for kind, names in self.leaves.items()]
            leaves = "; ".join([*named, "nothing else"]) if named else "nothing"
        budgets = ((self.round_bytes, "a round"), (self.total_bytes, "in all"))
        limits = [f"at most {limit:,} {when}" for limit, when in budgets if limit is not None]
        algorithms = [] if self.allow is None else [f"algorithms: {', '.join(self.allow) or 'none'}"]
        filters = [required.describe() for required in self.filters]
        return [
            f"may leave: {leaves}",
            f"bytes: {', '.join(limits) or 'any number'}",
            floor,
            *algorithms,
            f"filters: {', '.join(filters) or 'none'}",
        ]


NO_FILE = Policy(**dict[str, Any]())
"""What holds at a site without a policy file."""


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        ConfigError: with every problem found; from a file with a mistake there is no policy, so nothing leaves.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file"]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as TOML: {error}"]) from error
    problems = unknown(tree, ("version", "leaves", *SECTIONS, "filters"), "")
    if type(tree.get("version")) is not int or tree["version"] != 1:
        found = f"found {tree['version']!r}" if "version" in tree else "missing"
        problems.append(f"version: {found}, expected 1, the form of policy files that this celora reads")
    values: dict[str, Any] = {}
    for section, names in SECTIONS.items():
        table = _table(section, tree.get(section, {}), problems)
        problems += unknown(table, names, f"{section}.")
        chosen = {name: table[name] for name in names if name in table}
        if _valid(section, Policy, chosen, problems) is not None:
            values |= chosen
    ups = [algorithm.info.up for algorithm in (*ALGORITHMS.values(), *_allowed(values.get("allow", ()), problems))]
    if "leaves" in tree:
        values["leaves"] = _leaves(_table("leaves", tree["leaves"], problems), ups, problems)
    values["filters"] = read_filters(tree.get("filters", []), problems)
    if problems:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    return Policy(**values)


def _allowed(names: Iterable[str], problems: list[str]) -> list[type[Any]]:
    """The algorithms in the section [algorithms] that there are at this site."""
    found = list[type[Any]]()
    for name in names:
        try:
            found.append(lookup(name))
        except ConfigError as error:
            problems += [f"algorithms.allow: {problem}" for problem in error.problems]
    return found


def _leaves(table: dict[str, Any], ups: Iterable[type], problems: list[str]) -> dict[str, tuple[str, ...]]:
    """The section [leaves]; without quotes `fedit.Up = …` is a table in a table, and means the same."""
    records = {name_of(kind): kind for kind in (*ups, Reply, ClientFacts)}
    flat, leaves = list[tuple[str, Any]](), dict[str, tuple[str, ...]]()
    for key, value in table.items():
        nested = isinstance(value, dict)
        flat += [(f"{key}.{name}", inner) for name, inner in value.items()] if nested else [(key, value)]
    for kind, names in flat:
        if kind not in records:
            hint = did_you_mean(kind, records)
            problems.append(f"leaves.{kind}: unknown record{hint} (allowed: {', '.join(records)})")
        elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.append(f"leaves.{kind}: found {names!r}, expected a list of the fields that may leave")
        elif kind in leaves:
            problems.append(f"leaves.{kind}: found it twice, expected it once")
        else:
            known = [field.name for field in _fields(records[kind])]
            problems += [
                f"leaves.{kind}: unknown field {name!r}{did_you_mean(name, known)} (allowed: {', '.join(known)})"
                for name in names
                if name not in known
            ]
            leaves[kind] = tuple(names)
    return leaves


def is_empty(value: object) -> bool:
    """Whether a field holds nothing that could leave: None, or a text, bytes, tuple or mapping without content."""
    return value is None or (isinstance(value, str | bytes | tuple | Mapping) and not value)


def _table(section: str, found: Any, problems: list[str]) -> dict[str, Any]:
    if isinstance(found, dict):
        return found
    problems.append(f"{section}: found {found!r}, expected a table")
    return {}


def _valid(section: str, kind: type, table: dict[str, Any], problems: list[str]) -> Any:
    try:
        return kind(**table)
    except ValidationError as error:
        problems += error_lines(error, section, [field.name for field in _fields(kind)])
        return None


def _fields(of: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(of)
