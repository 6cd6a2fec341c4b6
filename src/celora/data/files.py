"""A user's own files: CSV, JSON Lines, Parquet, arrays (.npz) and images, one file for each client or one for all.

Text files are UTF-8 (with or without a byte order mark) and may be packed with gzip. They are read record by record,
never as a whole. What cannot be read is an error that names the file, the line, what was expected and what to do.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from celora.data.columns import Columns, Sheet
from celora.data.gather import gather
from celora.data.image_files import SUFFIXES, arrays, image_file
from celora.data.table import Table, did_you_mean, listing, natural_key
from celora.errors import DataError
from celora.lazy import Lazy

pyarrow, pyarrow_parquet = Lazy("pyarrow"), Lazy("pyarrow.parquet")
Read = Callable[[Path, str, Columns], Sheet]
Records = Iterator[tuple[int, Mapping[str, object]]]
_PARQUET_ROWS = 256
"""Rows of a Parquet file that are read at a time."""


def read_files(pattern: str, base: Path, columns: Columns, test: str | None = None) -> Table:
    """The table in a file or in all files that match a pattern such as "sites/*.csv".

    With several files and no client column, each file is a client, called by the part of its path that tells
    the files apart: the stem, else the folder. `test` names the test file, or one test file for each client;
    a file that `pattern` matches, too, is a test file only. An image file is a row, labelled by its folder.

    Args:
        pattern: relative to `base`, or absolute; `*`, `?`, `[…]` and `**` match as in a shell.

    Raises:
        DataError: no such file, an unknown format, a file that cannot be read, or a missing column.
    """
    tests = [] if test is None else find(test, base)
    paths = [path for path in find(pattern, base) if path not in tests]
    if not paths:
        raise DataError(f"source = {pattern!r} and test = {test!r} name the same files; give other training files.")
    client = _naming(paths, base) if len(paths) > 1 and _reader(paths[0]) is not _image else None
    sheets = []
    for path, split in [*((one, "train") for one in paths), *((one, "test") for one in tests)]:
        sheet = _reader(path)(path, _shown(path, base), columns)
        sheets.append(replace(sheet, group=client and client(path), split=None if test is None else split))
    table = gather(sheets, columns)
    if tests and "test" not in (table.splits or ()):
        raise DataError(f"test = {test!r} holds no usable row; fill it, or drop `test` to split the rows by share.")
    return table


def find(pattern: str, base: Path) -> list[Path]:
    """The files that a path or pattern means, in natural order.

    Raises:
        DataError: if there is none; the message lists what is there instead.
    """
    path = base / Path(pattern).expanduser()
    if path.is_dir():
        if images := [one for one in path.rglob("*") if one.name.lower().endswith(SUFFIXES) and one.is_file()]:
            return sorted(images, key=lambda one: natural_key(str(one)))
        raise DataError(
            f"{pattern!r} is a folder that holds no image, expected a file or a pattern. Write for example "
            f"'{pattern}/*.csv'."
        )
    if path.is_file():
        _reader(path)
        return [path]
    if not glob.has_magic(pattern):
        if not path.parent.is_dir():
            raise DataError(f"no file {pattern!r}: the folder {path.parent} does not exist. Paths start at {base}.")
        near = sorted(one.name for one in path.parent.iterdir() if one.is_file())
        raise DataError(
            f"no file {pattern!r}; the folder {path.parent} holds {listing(near) or 'no files'}."
            f"{did_you_mean(path.name, near)} Paths start at {base}."
        )
    expanded = str(Path(pattern).expanduser())
    found = [Path(one) for one in glob.glob(expanded, root_dir=base, recursive=True)]
    paths = sorted((base / one for one in found if (base / one).is_file()), key=lambda one: natural_key(str(one)))
    if not paths:
        raise DataError(f"no file matches {pattern!r}. Patterns start at {base}; expected are {listing(_READERS)}.")
    for path in paths:
        _reader(path)
    return paths


def _reader(path: Path) -> Read:
    for suffix, read in _READERS.items():
        if path.name.lower().endswith(suffix):
            return read
    raise DataError(
        f"{path.name} is of no known format: found the ending {path.suffix!r}, expected {listing(_READERS)}. "
        "Export it as CSV with a header line, or as one JSON object a line."
    )


def _shown(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _naming(paths: Sequence[Path], base: Path) -> Callable[[Path], str]:
    """How a file's client is called: by its stem if all stems differ, else its folder, else its whole
    path."""

    def stem(path: Path) -> str:
        return path.name[: -len(next(end for end in _READERS if path.name.lower().endswith(end)))]

    def folder(path: Path) -> str:
        return path.parent.name

    def whole(path: Path) -> str:
        return _shown(path, base)

    return next((name for name in (stem, folder) if len({name(path) for path in paths}) == len(paths)), whole)


def _lines(path: Path, name: str) -> Iterator[str]:
    """The decoded lines of a file, each with its end."""
    start = b""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                start = start or raw[:2]
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                yield _decoded(line, f"{name}:{number}", path, start)
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{name} cannot be read: {error}. Check its permissions, or copy it again.") from error


def _decoded(line: bytes, where: str, path: Path, start: bytes) -> str:
    """A line as text; the first two bytes of the file tell UTF-16 from other encodings."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        code = "UTF-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "CP1252"
        raise DataError(
            f"{where}: found the byte 0x{line[error.start]:02x}, which is not UTF-8. "
            f"Save the file as UTF-8, for example: iconv -f {code} -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None


def _csv(path: Path, name: str, columns: Columns) -> Sheet:
    with closing(_values(path, name)) as rows:
        header = [value.strip() for value in next(rows, (1, []))[1]]
    if twice := next((one for one in header if one in columns.wanted() and header.count(one) > 1), None):
        raise DataError(f"{name}: the header names the column {twice!r} twice; rename one of them.")

    def records() -> Records:
        for line, values in islice(_values(path, name), 1, None):
            if len(values) != len(header):
                raise DataError(
                    f"{name}:{line}: found {len(values)} values, expected {len(header)} as in the header. "
                    "Put texts that hold a comma or a line break in double quotes."
                )
            yield line, dict(zip(header, values, strict=True))

    return Sheet(name, header, records())


def _values(path: Path, name: str) -> Generator[tuple[int, list[str]]]:
    """The line at which each record of a CSV file starts, and its values; the first record is the header."""
    reader = csv.reader(_csv_lines(path, name), strict=True)
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}:{line}: not CSV: {error}. A double quote is probably not closed; inside a quoted text "
            'it is written twice: "".'
        ) from error


def _csv_lines(path: Path, name: str) -> Iterator[str]:
    """The lines as the `csv` module counts them: a carriage return alone ends one, too."""
    for line in _lines(path, name):
        if "\r" in line.removesuffix("\n").removesuffix("\r"):
            yield from io.StringIO(line, newline="")
        else:
            yield line


def _jsonl(path: Path, name: str, columns: Columns) -> Sheet:
    keys: dict[str, None] = {}

    def records() -> Records:
        for number, ended in enumerate(_lines(path, name), start=1):  # splitlines() would cut at U+2028
            line = ended.removesuffix("\n")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                hint = " One object a line is expected, not one array for the file." if line.lstrip()[0] == "[" else ""
                raise DataError(f"{name}:{number}: not JSON: {error}.{hint} Correct or remove the line.") from None
            if not isinstance(record, dict):
                example = ", ".join(f'"{column}": "…"' for column in columns.names())
                raise DataError(
                    f"{name}:{number}: found a JSON {type(record).__name__}, expected one object a line, "
                    f"such as {{{example}}}."
                )
            keys.update(dict.fromkeys(record))
            yield number, record

    return Sheet(name, keys.keys(), records())


def _parquet(path: Path, name: str, columns: Columns) -> Sheet:
    with _parquet_file(path, name) as file:
        names = list(file.schema_arrow.names)

    def records() -> Records:
        with _parquet_file(path, name) as file:
            chosen = [one for one in names if one in columns.wanted()]
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=chosen)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)

    return Sheet(name, names, records(), unit="row")


@contextmanager
def _parquet_file(path: Path, name: str) -> Iterator[Any]:
    try:
        with pyarrow_parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name} cannot be read as Parquet: {error}. Write the file again.") from error


def _npz(path: Path, name: str, columns: Columns) -> Sheet:
    return arrays(path, name, columns.image)


def _image(path: Path, name: str, columns: Columns) -> Sheet:
    if columns.image is None:
        raise DataError(f'{name} is an image: set `image = "image"` in [data] to have images in place of texts.')
    return image_file(path, name, columns.image, columns.label, columns.client)


_READERS: Mapping[str, Read] = {
    ".csv": _csv, ".csv.gz": _csv, ".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".parquet": _parquet, ".npz": _npz,
    **dict.fromkeys(SUFFIXES, _image),
}  # fmt: skip
