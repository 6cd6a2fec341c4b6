"""An algorithm by its name: one of the table, one that an installed package offers, or `package.module:Class`.

A package offers one by an entry point of the group `celora.algorithms`, in its pyproject.toml:

    [project.entry-points."celora.algorithms"]
    my-method = "my_package.my_method:MyMethod"
"""

import dataclasses
import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from celora.algorithms import ALGORITHMS
from celora.core.algorithm import Algorithm
from celora.errors import ConfigError
from celora.fields import did_you_mean

GROUP = "celora.algorithms"


def known() -> tuple[str, ...]:
    """All names there are: those of the table, then those that installed packages offer."""
    return tuple(dict.fromkeys([*ALGORITHMS, *sorted(point.name for point in _offered())]))


def package(name: str) -> str | None:
    """The installed package that offers this name; None for a name of the table, and for `package.module:Class`."""
    return next((_package(point) for point in _offers(name)), None)


def lookup(name: str, labels: Iterable[str] = ()) -> type[Any]:
    """The algorithm of this name. This imports the module it is in, so whoever calls it must trust the name.

    Args:
        labels: what else the caller's user may have meant, to be named if there is no such algorithm.

    Raises:
        ConfigError: with one problem, which begins with what was found: the name is unknown, more than one algorithm
            has it, or what it names cannot be imported or is no algorithm.
    """
    offers = _offers(name)
    if len(offers) + (name in ALGORITHMS) > 1:
        who = ["celora itself"] * (name in ALGORITHMS) + [f"the package {_package(p)} ({p.value})" for p in offers]
        raise ConfigError(
            [f"found {name!r}, a name that {' and '.join(who)} have; ask for the class, such as {offers[-1].value!r}"]
        )
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if offers:
        return _imported(offers[0].value, f"{name!r} of the package {_package(offers[0])}")
    if ":" in name:
        return _imported(name, repr(name))
    names = [*known(), *labels]
    listed, hint = ", ".join(map(repr, dict.fromkeys(names))), did_you_mean(name, names)
    raise ConfigError([f"found {name!r}, expected one of {listed} or 'package.module:Class'{hint}"])


def missing(kind: type) -> list[str]:
    """The members of `Algorithm` that a class lacks."""
    members = [name for name in (*Algorithm.__annotations__, *vars(Algorithm)) if not name.startswith("_")]
    abstract: frozenset[str] = vars(kind).get("__abstractmethods__", frozenset())
    return [name for name in members if not hasattr(kind, name) or name in abstract]


def _imported(path: str, what: str) -> type[Any]:
    """The class at `package.module:Class`."""
    module_name, _, class_name = path.partition(":")
    if not all(step.isidentifier() for step in (*module_name.split("."), class_name)):
        raise ConfigError([f"found {what}, expected 'package.module:Class'"])
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of somebody else's raises
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {cause}"
        raise ConfigError(
            [f"found {what}, but the module {module_name} cannot be imported ({why}); install its package, or mend it"]
        ) from error
    kind = vars(module).get(class_name)
    if not isinstance(kind, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(
            [f"found {what}, but {module_name} has no class {class_name}{did_you_mean(class_name, classes)}"]
        )
    if lacks := missing(kind):
        raise ConfigError(
            [
                f"found {what}, which is no algorithm: {class_name} lacks {', '.join(lacks)}; expected "
                f"class {class_name}(Algorithm[Server, Local, Down, Up]), see celora.core.algorithm"
            ]
        )
    if not dataclasses.is_dataclass(kind):
        raise ConfigError([f"found {what}, but {class_name} has no settings; expected @settings above the class"])
    return kind


@cache
def _offered() -> tuple[EntryPoint, ...]:
    """What all installed packages offer: looking through them takes a while, and none comes while a program runs."""
    return tuple(entry_points(group=GROUP))


def _offers(name: str) -> list[EntryPoint]:
    return [point for point in _offered() if point.name == name]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module
