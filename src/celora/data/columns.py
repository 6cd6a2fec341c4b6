"""From raw records to a `Table`: which columns are read, what counts as missing, and what is said about it.

Every source of texts (files, the Hub) yields `Sheet`s; `gather` is the one place that judges their rows. A record is
read, judged and written away before the next one is read.
"""

import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celora.data.arrow import ArrowColumn
from celora.data.inputs import ImageFiles, Images, Texts, size_of
from celora.data.table import SPLITS, Origins, Table, counted, did_you_mean, listing
from celora.errors import DataError
from celora.lazy import Lazy

pillow = Lazy("PIL.Image")
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; `client` and `split` are optional, `image` takes the place of `text`."""

    text: str
    label: str
    client: str | None = None
    split: str | None = None
    image: str | None = None

    def settings(self) -> dict[str, str]:
        """The columns that must exist -> the setting that chose them."""
        content = {"text": self.text} if self.image is None else {"image": self.image}
        chosen = {"split": self.split, "client": self.client, "label": self.label, **content}
        return {name: setting for setting, name in reversed(chosen.items()) if name}

    @property
    def content(self) -> str:
        """What a row holds, in a word."""
        return "text" if self.image is None else "image"

    def names(self) -> list[str]:
        """The columns that must exist."""
        return list(self.settings())


@dataclass(frozen=True)
class Sheet:
    """One file, or one split of a Hub data set, as it was found."""

    name: str
    columns: Collection[str]
    """Their names; where each record has its own (JSON Lines), those of the records that were read so far."""
    records: Iterable[tuple[int, Mapping[str, object]]]
    """(line or row number, values), read as they are asked for; a missing column or None is a missing value."""
    unit: str = "line"
    group: str | None = None
    """The client this sheet belongs to, if there is one sheet for each client."""
    split: str | None = None
    """The split this sheet is, if its source fixes it."""


def gather(sheets: Sequence[Sheet], columns: Columns) -> Table:
    """Check the columns of all sheets, then collect their usable rows.

    Rows without a text, a label or (where asked for) a client are left out and counted in `notices`; a sheet
    of one client without usable rows goes to `empty`.

    Raises:
        DataError: a column is missing, a value is of the wrong kind, or nothing usable is left.
    """
    _check_columns(sheets, columns)
    rows = _Rows(columns)
    contents = (content for sheet in sheets for content in rows.of(sheet))
    inputs: Texts | Images = Texts(contents) if columns.image is None else rows.images(ArrowColumn(contents))
    _check_columns(sheets, columns)  # again: those of JSON Lines are known now
    if not rows.labels:
        raise DataError(
            f"found no usable row: {'; '.join([*rows.notices, *rows.empty.values()])}. "
            f"Expected rows with a value in {listing(columns.names())}; fill them in or choose other columns."
        )
    return Table(
        inputs=inputs, labels=rows.labels, groups=_complete(rows.groups), splits=_complete(rows.splits),
        rows=rows.origins, notices=tuple(rows.notices), empty=rows.empty,
    )  # fmt: skip


class _Rows:
    """The usable rows found so far, but for their texts and images, which `of` hands on."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.labels: list[str] = []
        self.groups: list[str | None] = []
        self.splits: list[str | None] = []
        self.origins = Origins()
        self.notices: list[str] = []
        self.empty: dict[str, str] = {}
        self._size: tuple[int, int] | None = None
        self._unlike: str | None = None

    def of(self, sheet: Sheet) -> Iterator[Any]:
        """The text or the image file of each usable row of a sheet, the rest of which is noted."""
        columns, before = self.columns, len(self.labels)
        left_out: Counter[str] = Counter()
        first: dict[str, int] = {}
        for number, record in sheet.records:
            where = f"{sheet.name}:{number}"
            content = self._content(record, where)
            label = _name(record.get(columns.label), columns.label, where)
            group, split = sheet.group, sheet.split
            if columns.client:
                group = _name(record.get(columns.client), columns.client, where)
            if content is None or label is None or (columns.client and group is None):
                missing = columns.content if content is None else "label" if label is None else "client"
                left_out[missing] += 1
                first.setdefault(missing, number)
                continue
            if columns.split:
                split = _split(record.get(columns.split), columns.split, where)
            if isinstance(content, bytes):
                self._measure(content, where)
            self.labels.append(sys.intern(label))  # one string for each label, however many rows have it
            self.groups.append(group and sys.intern(group))
            self.splits.append(split)
            self.origins.add(sheet.name, number)
            yield content
        for missing, count in left_out.items():
            were = "was" if count == 1 else "were"
            self.notices.append(
                f"{sheet.name}: {counted(count, 'row')} without {_a(missing)} {were} left out "
                f"(first: {sheet.unit} {first[missing]})"
            )
        if len(self.labels) == before:
            reason = f"{sheet.name} holds no {'usable row' if left_out else 'rows'}"
            if sheet.group is None or columns.client or sheet.split == "test":
                self.notices.append(reason)
            else:
                self.empty[sheet.group] = reason

    def _content(self, record: Mapping[str, object], where: str) -> str | bytes | None:
        """What the row holds; None if it is missing."""
        name = self.columns.image
        if name is None:
            return _text(record.get(self.columns.text), self.columns.text, where)
        return _image(record.get(name), name, where)

    def _measure(self, image: bytes, where: str) -> None:
        """Note the size of an image; whether all must be alike depends on the model."""
        size = size_of(image, where, str(self.columns.image))
        self._size = self._size or size
        if size != self._size and self._unlike is None:
            found, expected = (" × ".join(map(str, one)) for one in (size, self._size))
            self._unlike = (
                f"{where}: found an image of {found} pixels, expected {expected} as before; resize them alike."
            )

    def images(self, column: ArrowColumn) -> ImageFiles:
        """The images, whose files are in a column."""
        return ImageFiles(column, self._size or (0, 0), str(self.columns.image), self.origins, self._unlike)


def _complete(values: list[str | None]) -> list[str] | None:
    """The column if every row has a value, else None: the source does not say it of all rows."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _check_columns(sheets: Sequence[Sheet], columns: Columns) -> None:
    for sheet in sheets:
        names = list(sheet.columns)
        missing = [name for name in columns.names() if name not in names]
        if not missing or not names:  # a file of zero bytes is an empty client, not a misnamed column
            continue
        name = missing[0]
        message = f"{sheet.name} has no column {name!r}; its columns are {listing(names, 12)}."
        other = next((one.name for one in sheets if name in one.columns), None)
        if other:
            message += f" {other} has it: all files need the same columns; rename it in {sheet.name}."
        elif len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            message += " The header does not look separated by commas; celora reads comma-separated files."
        else:
            chosen = columns.settings()[name]
            message += f'{did_you_mean(name, names)} Set `{chosen} = "…"` in [data] to the right one.'
        raise DataError(message)


def _text(value: object, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise DataError(
        f"{where}: column {column!r} holds {_kind(value)}, expected a text in quotes. "
        "Point `text` in [data] at a column of texts, or write this one as texts."
    )


def _image(value: object, column: str, where: str) -> bytes | None:
    """The bytes of a JPEG, PNG, … file: as they are, or as the Hub's data sets hold them, {bytes, path}."""
    value = value.get("bytes") if isinstance(value, Mapping) else value
    if value is None or not value:
        return None
    if not isinstance(value, bytes):
        raise DataError(f"{where}: column {column!r} holds {_kind(value)}, expected the bytes of an image file.")
    return value


def _name(value: object, column: str, where: str) -> str | None:
    """A label or client as a name: 1, 1.0 and "1" are the same, white space around it does not count."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    if value is None:
        return None
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    raise DataError(
        f"{where}: column {column!r} holds {_kind(value)}, expected one name or number a row. "
        "Choose another column in [data], or write one value for each row."
    )


def _split(value: object, column: str, where: str) -> str:
    name = SPLIT_NAMES.get(str(value).strip().lower())
    if name is None:
        raise DataError(
            f"{where}: column {column!r} holds {value!r}, expected one of {listing(SPLIT_NAMES)}. "
            "Correct the row, or drop `split` from [data] to have the rows split by share."
        )
    return name


def _a(noun: str) -> str:
    return f"an {noun}" if noun == "image" else f"a {noun}"


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"a value of type {type(value).__name__}"
