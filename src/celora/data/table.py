"""What a source yields and what the clients hold: `Table` -> `FederatedDataset` of `ClientRows`s.

A row is named by its position in the table; texts and images stay in one place, never copied for a client.
"""

import difflib
import hashlib
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from celora.data.inputs import Images, Records, Texts, add_strings, encoded

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Table:
    """A labelled data set before it is dealt out; all columns have the same length n."""

    inputs: Texts | Images | Records
    """n texts, n images, or n rows that consist of several things."""
    labels: list[str]
    """n label names; "" where a row has none and the task needs none."""
    groups: list[str] | None
    """The natural client of each row (a column, or the file it came from); None if the source has none."""
    splits: list[str] | None
    """"train", "validation" or "test" of each row, where the source fixes them."""
    rows: Sequence[str]
    """Where each row came from, for messages: "bank.csv:17"."""
    notices: tuple[str, ...] = ()
    """What was left out or looks odd, one sentence each."""
    empty: dict[str, str] = field(default_factory=dict)
    """Groups the source knows but has no usable row of (an empty file) -> the reason."""

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 over inputs, labels, groups and splits, in hex; file names and notices do not count.

        It is computed once, in a pass that decodes every image.

        Raises:
            DataError: naming the row of a damaged image.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        self.inputs.add_to(digest)
        for column in (self.labels, self.groups, self.splits):
            if column is None:
                digest.update(b"none")
            else:
                add_strings(digest, len(column), map(encoded, column))
        return digest.hexdigest()


class Origins(Sequence[str]):
    """Where each row came from, "bank.csv:17"; a name for each sheet and a number for each row are all that is held."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._starts: list[int] = []
        self._numbers = array("q")

    def add(self, name: str, number: int) -> None:
        """Note the next row: its sheet, and its line or row there."""
        if not self._names or self._names[-1] != name:
            self._names.append(name)
            self._starts.append(len(self))
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[at] for at in range(len(self))[row]]
        at = range(len(self))[row]  # an IndexError beyond the end, and what a negative position means
        return f"{self._names[bisect_right(self._starts, at) - 1]}:{self._numbers[at]}"


@dataclass(frozen=True)
class ClientRows:
    """One client's rows of the table; the three lists are disjoint."""

    train: list[int]
    validation: list[int]
    test: list[int]


@dataclass(frozen=True)
class FederatedDataset:
    """A table, dealt out."""

    table: Table
    clients: dict[str, ClientRows]
    """Client id -> its rows, in natural order of the ids ("bank2" before "bank10")."""
    excluded: dict[str, str]
    """Client id -> why it takes no part ("has no training rows")."""
    notices: tuple[str, ...]
    """The table's notices, and what is odd about the clients: one class only, no test rows, …"""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message, the first few of them.

    >>> listing(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    all_names = list(names)
    shown = ", ".join(repr(name) for name in all_names[:limit])
    return shown if len(all_names) <= limit else f"{shown} and {len(all_names) - limit} more"


def counted(count: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that reads numbers as numbers.

    >>> sorted(["bank10", "bank2", "atm"], key=natural_key)
    ['atm', 'bank2', 'bank10']
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'text'?", or nothing if no known word is near; capitals do not count.

    >>> did_you_mean("txt", ["text", "label"])
    " Did you mean 'text'?"
    """
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" Did you mean {lower[near[0]]!r}?" if near else ""
