"""The names of classes, as clients agree on them: all that occur anywhere, or those that the experiment lists."""

from collections.abc import Iterable

from celora.errors import DataError
from celora.wire import pack, record, unpack

Listed = tuple[str, ...] | None
"""The setting `task.classes`."""


@record
class Classes:
    """The names of classes, sorted; the id of a class is its position."""

    names: tuple[str, ...]


def propose(occurring: Iterable[str], listed: Listed) -> bytes:
    """The names that occur; nothing where the experiment lists them.

    Raises:
        DataError: if a name occurs that is not listed.
    """
    found = sorted(set(occurring))
    if listed is None:
        return pack(Classes(tuple(found)))
    if foreign := [label for label in found if label not in listed]:
        expected = ", ".join(repr(label) for label in listed[:8]) + (", …" if len(listed) > 8 else "")
        raise DataError(f"found the label {foreign[0]!r}, which task.classes does not list; expected one of {expected}")
    return b""


def merge(agreement: bytes, proposal: bytes, listed: Listed) -> bytes:
    """All names of both."""
    if listed is not None or not proposal:
        return agreement
    known = unpack(Classes, agreement).names if agreement else ()
    return pack(Classes(tuple(sorted({*known, *unpack(Classes, proposal).names}))))


def agreed(agreement: bytes, listed: Listed) -> tuple[str, ...]:
    """All names, sorted.

    Raises:
        DataError: if nobody has told any.
    """
    names = listed or (unpack(Classes, agreement).names if agreement else ())
    if not names:
        raise DataError(
            "no site has told its labels, and task.classes lists none; list them, or allow the field 'proposal' of "
            "'remote.ClientFacts' in the sites' policies"
        )
    return tuple(sorted(names))
