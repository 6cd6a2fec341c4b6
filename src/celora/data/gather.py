"""From raw records to a `Table`: what counts as missing, and what is said about it.

Every source (files, the Hub) yields `Sheet`s; `gather` is the one place that judges their rows. A record is read,
judged and written away before the next one is read.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from celora.core.reading import Content
from celora.data.arrow import ArrowColumn
from celora.data.columns import SPLIT_NAMES, Columns, Sheet
from celora.data.inputs import Column, ImageFiles, Images, ImagesBehind, Records, Texts, record, size_of
from celora.data.table import Origins, Table, counted, did_you_mean, listing
from celora.errors import DataError


def gather(sheets: Sequence[Sheet], columns: Columns) -> Table:
    """Check the columns of all sheets, then collect their usable rows.

    Rows without a text, a label or (where asked for) a client are left out and counted in `notices`; a sheet
    of one client without usable rows goes to `empty`.

    Raises:
        DataError: a column is missing, a value is of the wrong kind, or nothing usable is left.
    """
    sheets = _known(sheets)
    columns = columns.within({name for sheet in sheets for name in sheet.columns})
    _check_columns(sheets, columns)
    rows = _Rows(columns)
    inputs = rows.inputs(record for sheet in sheets for record in rows.of(sheet))
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


def _known(sheets: Sequence[Sheet]) -> list[Sheet]:
    """The sheets, at least one of which knows its columns: the first record of one is read where none does.

    No more than one file is then open, however many there are.
    """
    found = list(sheets)
    for at, sheet in enumerate(found):
        if any(one.columns for one in found):
            break
        records = iter(sheet.records)
        first = list(islice(records, 1))
        found[at] = replace(sheet, records=chain(first, records))
    return found


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

    def inputs(self, contents: Iterable[Mapping[str, Any]]) -> Texts | Images | Records:
        """The rows' contents: texts or images as they are, rows that consist of several things together."""
        match list(self.columns.forms[0].roles.items()):
            case [(role, "text")]:
                return Texts(row[role] for row in contents)
            case [(role, "image")]:
                return self._images(ArrowColumn(row[role] for row in contents), role)
            case _:
                column = ArrowColumn(record(row) for row in contents)
                return Records(column, None if self._size is None else self._images(ImagesBehind(column), "image"))

    def of(self, sheet: Sheet) -> Iterator[Mapping[str, Any]]:
        """What each usable row of a sheet consists of, by role; the rest of it is noted."""
        columns, before = self.columns, len(self.labels)
        (form,) = columns.forms
        left_out: Counter[str] = Counter()
        first: dict[str, int] = {}
        for number, values in sheet.records:
            where = f"{sheet.name}:{number}"
            content, missing = self._content(values, where)
            label = _name(values.get(columns.label), columns.label, where)
            if label is None and not form.labelled:
                label = ""
            group, split = sheet.group, sheet.split
            if columns.client:
                group = _name(values.get(columns.client), columns.client, where)
            if missing is None and (label is None or (columns.client and group is None)):
                missing = "label" if label is None else "client"
            if missing is not None or label is None:
                missing = missing or "label"
                left_out[missing] += 1
                first.setdefault(missing, number)
                continue
            if columns.split:
                split = _split(values.get(columns.split), columns.split, where)
            if isinstance(image := content.get("image"), bytes):
                self._measure(image, where)
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

    def _content(self, record: Mapping[str, object], where: str) -> tuple[dict[str, Any], str | None]:
        """What the row consists of, by role; and the role that is missing, if one is."""
        (form,) = self.columns.forms
        found: dict[str, Any] = {}
        for role, content in form.roles.items():
            column = self.columns.column(role)
            value = _READ[content](record.get(column), column, where)
            if value is not None:
                found[role] = value
            elif role not in form.optional:
                return found, role
        return found, None

    def _measure(self, image: bytes, where: str) -> None:
        """Note the size of an image; whether all must be alike depends on the model."""
        size = size_of(image, where, self.columns.column("image"))
        self._size = self._size or size
        if size != self._size and self._unlike is None:
            found, expected = (" × ".join(map(str, one)) for one in (size, self._size))
            self._unlike = (
                f"{where}: found an image of {found} pixels, expected {expected} as before; resize them alike."
            )

    def _images(self, column: Column, role: str) -> ImageFiles:
        """The images, whose files are in a column."""
        return ImageFiles(column, self._size or (0, 0), self.columns.column(role), self.origins, self._unlike)


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
        "Choose a column of texts in [data], or write this one as texts."
    )


def _image(value: object, column: str, where: str) -> bytes | None:
    """The bytes of a JPEG, PNG, … file: as they are, or as the Hub's data sets hold them, {bytes, path}."""
    value = value.get("bytes") if isinstance(value, Mapping) else value
    if value is None or not value:
        return None
    if not isinstance(value, bytes):
        raise DataError(f"{where}: column {column!r} holds {_kind(value)}, expected the bytes of an image file.")
    return value


def _value(value: object, column: str, where: str) -> Any:
    """A value as JSON has it; an empty one is missing."""
    return None if value is None or value in ("", [], {}) else value


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


_READ: Mapping[Content, Callable[[object, str, str], Any]] = {"text": _text, "image": _image, "value": _value}
