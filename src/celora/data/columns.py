"""From raw records to a `Table`: which columns are read, what counts as missing, and what is said about it.

Every source of texts (files, the Hub) yields `Sheet`s; `gather` is the one place that judges their rows.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from celora.data.table import SPLITS, Table, counted, did_you_mean, listing
from celora.errors import DataError
from celora.lazy import Lazy, Tensor, np, torch

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
    columns: Sequence[str]
    records: Iterable[tuple[int, Mapping[str, object]]]
    """(line or row number, values); a missing column or None is a missing value."""
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
    texts: list[str] = []
    images: list[Tensor] = []
    labels: list[str] = []
    groups: list[str | None] = []
    splits: list[str | None] = []
    rows: list[str] = []
    notices: list[str] = []
    empty: dict[str, str] = {}
    for sheet in sheets:
        before = len(rows)
        left_out: Counter[str] = Counter()
        first: dict[str, int] = {}
        for number, record in sheet.records:
            where = f"{sheet.name}:{number}"
            text = image = None
            if columns.image is None:
                text = _text(record.get(columns.text), columns.text, where)
            else:
                image = _image(record.get(columns.image), columns.image, where, images)
            content = text if columns.image is None else image
            label = _name(record.get(columns.label), columns.label, where)
            group, split = sheet.group, sheet.split
            if columns.client:
                group = _name(record.get(columns.client), columns.client, where)
            if content is None or label is None or (columns.client and group is None):
                missing = columns.content if content is None else "label" if label is None else "client"
                left_out[missing] += 1
                first.setdefault(missing, number)
                continue
            if image is not None:
                images.append(image)
            elif text is not None:
                texts.append(text)
            labels.append(label)
            groups.append(group)
            if columns.split:
                split = _split(record.get(columns.split), columns.split, where)
            splits.append(split)
            rows.append(where)
        for missing, count in left_out.items():
            were = "was" if count == 1 else "were"
            notices.append(
                f"{sheet.name}: {counted(count, 'row')} without {_a(missing)} {were} left out "
                f"(first: {sheet.unit} {first[missing]})"
            )
        if len(rows) == before:
            reason = f"{sheet.name} holds no {'usable row' if left_out else 'rows'}"
            if sheet.group is None or columns.client or sheet.split == "test":
                notices.append(reason)
            else:
                empty[sheet.group] = reason
    if not rows:
        raise DataError(
            f"found no usable row: {'; '.join([*notices, *empty.values()])}. "
            f"Expected rows with a value in {listing(columns.names())}; fill them in or choose other columns."
        )
    return Table(
        inputs=torch.stack(images) if columns.image else texts, labels=labels, groups=_complete(groups),
        splits=_complete(splits), rows=rows, notices=tuple(notices), empty=empty,
    )  # fmt: skip


def _complete(values: list[str | None]) -> list[str] | None:
    """The column if every row has a value, else None: the source does not say it of all rows."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _check_columns(sheets: Sequence[Sheet], columns: Columns) -> None:
    for sheet in sheets:
        missing = [name for name in columns.names() if name not in sheet.columns]
        if not missing or not sheet.columns:  # a file of zero bytes is an empty client, not a misnamed column
            continue
        name = missing[0]
        message = f"{sheet.name} has no column {name!r}; its columns are {listing(sheet.columns, 12)}."
        other = next((one.name for one in sheets if name in one.columns), None)
        if other:
            message += f" {other} has it: all files need the same columns; rename it in {sheet.name}."
        elif len(sheet.columns) == 1 and any(mark in sheet.columns[0] for mark in ";\t|"):
            message += " The header does not look separated by commas; celora reads comma-separated files."
        else:
            chosen = columns.settings()[name]
            message += f'{did_you_mean(name, sheet.columns)} Set `{chosen} = "…"` in [data] to the right one.'
        raise DataError(message)


def _text(value: object, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise DataError(
        f"{where}: column {column!r} holds {_kind(value)}, expected a text in quotes. "
        "Point `text` in [data] at a column of texts, or write this one as texts."
    )


def _image(value: object, column: str, where: str, others: Sequence[Tensor]) -> Tensor | None:
    """(3, h, w) uint8 of a JPEG, PNG, …: bytes, or as the Hub's data sets hold them, {bytes, path}."""
    value = value.get("bytes") if isinstance(value, Mapping) else value
    if value is None or not value:
        return None
    if not isinstance(value, bytes):
        raise DataError(f"{where}: column {column!r} holds {_kind(value)}, expected the bytes of an image file.")
    try:
        with pillow.open(io.BytesIO(value)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, ValueError) as error:  # UnidentifiedImageError is an OSError
        raise DataError(f"{where}: column {column!r} holds no readable image: {error}.") from error
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    if others and image.shape != others[0].shape:
        found, expected = (" × ".join(map(str, one.shape[1:])) for one in (image, others[0]))
        raise DataError(f"{where}: found an image of {found} pixels, expected {expected} as before; resize them alike.")
    return image


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
