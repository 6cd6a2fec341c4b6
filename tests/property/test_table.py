"""The table of a source is the same whatever the format of the file, and its rows are those that were written."""

import csv
import gzip
import hashlib
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from celora.data import Data, read
from celora.data.arrow import ArrowColumn
from celora.data.table import Table

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
NAME = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6)
ROWS = st.lists(st.tuples(TEXT, NAME, NAME), min_size=1, max_size=12).filter(
    lambda rows: any(r[0].strip() for r in rows)
)
COLUMNS = ("text", "label", "client")


def written(folder: Path, rows: list[tuple[str, str, str]]) -> list[str]:
    """The same rows in every format; the names of the files."""
    records = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    comma = io.StringIO(newline="")
    csv.writer(comma, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *rows])
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for name, content in (("a.csv", comma.getvalue()), ("a.jsonl", lines)):
        (folder / name).write_bytes(content.encode())
        (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
    return ["a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"]


def fingerprint(texts: list[str], labels: list[str], groups: list[str]) -> str:
    """As manifests have always had it, from whole lists."""
    digest = hashlib.sha256()
    for column in (texts, labels, groups):
        digest.update(f"column {len(column)}".encode())
        for value in column:
            digest.update(len(value.encode()).to_bytes(8, "little") + value.encode())
    digest.update(b"none")
    return digest.hexdigest()


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_every_format_gives_the_same_table(rows: list[tuple[str, str, str]]) -> None:
    kept = [(text, label.strip(), client.strip()) for text, label, client in rows if text.strip()]
    texts, labels, groups = (list(column) for column in zip(*kept, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        tables: dict[str, Table] = {
            name: read(Data(source=name, client="client"), Path(folder)) for name in written(Path(folder), rows)
        }
    for name, table in tables.items():
        assert ([*table.inputs], [table.inputs[row] for row in range(len(table))]) == (texts, texts)
        assert (table.labels, table.groups, table.splits) == (labels, groups, None)
        assert table.fingerprint() == fingerprint(texts, labels, groups)
        assert [row.startswith(f"{name}:") for row in table.rows] == [True] * len(texts)
        assert len(table.notices) == (len(rows) > len(texts))
    assert len({tuple(row.rsplit(":")[1] for row in tables[name].rows) for name in ("a.csv", "a.csv.gz")}) == 1


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.binary(max_size=30) | st.integers(1, 3).map(lambda n: b"x" * (n << 19)), max_size=12))
def test_a_column_gives_back_what_was_written_whichever_way_it_is_read(rows: list[bytes]) -> None:
    column = ArrowColumn(rows)
    assert len(column) == len(rows)
    assert [column[at] for at in range(len(rows))] == rows
    walk = iter(column)
    assert [next(walk) for _ in rows[:1]] == rows[:1]
    assert list(column) == rows
