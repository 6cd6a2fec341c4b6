"""The names of classes, as clients agree on them: all that occur anywhere, or those that the experiment lists."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

from celora.core.reading import Columns
from celora.core.task import HeadTensor, Task
from celora.errors import DataError
from celora.fields import setting, settings
from celora.tasks import common
from celora.wire import pack, record, unpack


@record
class Classes:
    """The names of classes, sorted; the id of a class is its position."""

    names: tuple[str, ...]


@settings
class Named(Task):
    """A task with a linear head whose outputs have names that all clients agree on.

    Attributes:
        classes: as the experiment lists them, or as agreed; None before the agreement.
    """

    classes: tuple[str, ...] | None = setting(
        None, "all labels there are; none: those that occur (sites then tell the server theirs)"
    )

    def occurring(self, columns: Columns) -> Iterable[str]:
        """The names that a client's rows have.

        Raises:
            DataError: if the rows have none, or something else.
        """
        return columns.labels

    def propose(self, columns: Columns) -> bytes:
        """The names that occur; nothing where the experiment lists them.

        Raises:
            DataError: as `occurring`, and if a name occurs that is not listed.
        """
        found = sorted(set(self.occurring(columns)))
        if self.classes is None:
            return pack(Classes(tuple(found)))
        if foreign := [label for label in found if label not in self.classes]:
            expected = ", ".join(repr(label) for label in self.classes[:8]) + (", …" if len(self.classes) > 8 else "")
            raise DataError(
                f"found the label {foreign[0]!r}, which task.classes does not list; expected one of {expected}"
            )
        return b""

    def merge(self, agreement: bytes, proposal: bytes) -> bytes:
        """All names of both."""
        if self.classes is not None or not proposal:
            return agreement
        known = unpack(Classes, agreement).names if agreement else ()
        return pack(Classes(tuple(sorted({*known, *unpack(Classes, proposal).names}))))

    def agreed(self, agreement: bytes) -> Self:
        """With all names, sorted.

        Raises:
            DataError: if nobody has told any.
        """
        names = self.classes or (unpack(Classes, agreement).names if agreement else ())
        if not names:
            raise DataError(
                "no site has told its labels, and task.classes lists none; list them, or allow the field 'proposal' of "
                "'remote.ClientFacts' in the sites' policies"
            )
        return replace(self, classes=tuple(sorted(names)))

    @property
    def ids(self) -> Mapping[str, int]:
        """Name -> position."""
        return {name: number for number, name in enumerate(self.classes or ())}

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        """An output for each name; none before the agreement."""
        return {} if self.classes is None else common.head(len(self.classes), width)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The names."""
        return {"classes": list(self.classes or ())}
