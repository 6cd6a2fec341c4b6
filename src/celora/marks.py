"""What an annotation says of a field besides its type: who needs such a field finds it by its mark, never by its name.

    @record
    class Up:
        core: Tensors
        n: RowCount
        sketch: Summary[Mixture | None]

A mark says nothing to the wire: a record's layout and bytes are the same with and without.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar

T = TypeVar("T")
M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Of a record that goes up: a number outside of these bounds makes the server refuse the whole reply."""

    least: int
    most: int


@dataclasses.dataclass(frozen=True)
class DataSummary:
    """Of a record that goes up: it describes a client's data; its bytes are counted apart from the adapter's."""


@dataclasses.dataclass(frozen=True)
class MixingMatrix:
    """Of a record that the server keeps: who learned from whom (`core.algorithm.Mixing`), for the run folder."""


@dataclasses.dataclass(frozen=True)
class Received:
    """Of a record that a client keeps: a copy of what the server sends to everybody; private only in where it lies."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """Of a record that a client keeps: what it has itself sent to the server, and what no other client may get."""


@dataclasses.dataclass(frozen=True)
class DisclosureFloor:
    """Of settings: the fewest training rows behind anything that leaves; a site accepts no less than its own floor."""


@dataclasses.dataclass(frozen=True)
class SiteSecret:
    """Of settings: the path of a secret that each site fills in itself, and that the server never names."""


RowCount = Annotated[int, Bounded(1, 10**9)]
"""How many rows a client speaks for; an absurd number would be the whole average."""
Summary = Annotated[T, DataSummary()]
"""`Summary[X | None]`: an X that is a data summary, sent when the server asks for it."""


def marked(kind: type, mark: type[M]) -> Mapping[str, M]:
    """The fields of a record, or of settings, that are marked so: field -> its mark.

    >>> @dataclasses.dataclass
    ... class Up:
    ...     n: RowCount
    ...     loss: float
    >>> marked(Up, Bounded)
    {'n': Bounded(least=1, most=1000000000)}
    """
    return {name: note for name, notes in _notes_of(kind).items() for note in notes if isinstance(note, mark)}


@lru_cache
def _notes_of(kind: Any) -> Mapping[str, tuple[object, ...]]:
    """Field -> whatever its annotation says besides types."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: tuple(_notes(hints[field.name])) for field in dataclasses.fields(kind)}


def _notes(hint: Any) -> Iterator[object]:
    """What an annotation says besides types, wherever it says it: `RowCount | None` says what `RowCount` does."""
    if typing.get_origin(hint) is Annotated:
        yield from hint.__metadata__
        hint = hint.__origin__
    for inner in typing.get_args(hint):
        yield from _notes(inner)


def marked_values(value: Any, mark: type[M], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, M]]:
    """(path, value, mark) of all that is marked so in a record, in the records inside it as well."""
    items: Mapping[str, Any] = {}
    if isinstance(value, Mapping):
        items = value
    elif isinstance(value, tuple):
        items = {str(position): item for position, item in enumerate(value)}
    elif dataclasses.is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        for name, note in marked(type(value), mark).items():
            yield (*path, name), items[name], note
    for name, item in items.items():
        yield from marked_values(item, mark, (*path, name))
