"""Reading a user's own files, and what is said about bad ones."""

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from celora.core.reading import TEXTS, Form
from celora.data import Data, load, named, read
from celora.data.columns import Sheet
from celora.data.gather import gather
from celora.data.inputs import ImageFiles
from celora.data.table import Table
from celora.errors import DataError

GOOD = "text,label\n" + "".join(f"row {i},{'yes' if i % 2 else 'no'}\n" for i in range(10))


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")


def table_of(base: Path, source: str, **more: object) -> Table:
    return read(Data(source=source, **more), base)


def error_of(base: Path, source: str, **more: object) -> str:
    with pytest.raises(DataError) as caught:
        load(Data(source=source, **more), base, seed=0)
    return str(caught.value)


def test_csv_jsonl_gzip_and_parquet_give_the_same_table(tmp_path: Path) -> None:
    records = [
        {"text": 'Grüße, "du"\nda', "label": 1, "other": [1]},
        {"text": "b\u2028c", "label": 2, "other": []},
    ]
    csv = 'text,label\n"Grüße, ""du""\nda",1\nb\u2028c, 2 \n'
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    write(tmp_path, a__csv="\ufeff" + csv, a__jsonl=lines)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv.encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace("\n", "\r\n").encode()))
    pq.write_table(
        pa.Table.from_pylist([{**record, "label": float(record["label"])} for record in records]),
        tmp_path / "a.parquet",
    )
    tables = [table_of(tmp_path, name) for name in ("a.csv", "a.jsonl", "a.csv.gz", "b.jsonl.gz", "a.parquet")]
    assert list(tables[0].inputs) == [record["text"] for record in records]
    assert tables[0].labels == ["1", "2"]
    assert len({table.fingerprint() for table in tables}) == 1
    assert list(tables[0].rows) == ["a.csv:2", "a.csv:4"]  # the first text spans two lines
    assert list(tables[1].rows) == ["a.jsonl:1", "a.jsonl:2"]
    assert tables[0].groups is None


def test_each_file_is_a_client_in_natural_order(tmp_path: Path) -> None:
    write(tmp_path, bank10__csv=GOOD, bank2__csv=GOOD)
    federation = load(Data(source="*.csv"), tmp_path, seed=0)
    assert list(federation.clients) == ["bank2", "bank10"]
    assert {federation.table.groups[row] for row in federation.clients["bank2"].train} == {"bank2"}
    assert set(federation.table.labels) == {"no", "yes"}
    assert federation.notices == ()
    assert federation.excluded == {}


def test_files_of_the_same_stem_are_called_by_their_folder_and_find_their_test_file(tmp_path: Path) -> None:
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
        write(tmp_path / site, train__csv=GOOD, test__csv="text,label\nlast one,yes\n")
    federation = load(Data(source="*/train.csv", test="*/test.csv", validation=0), tmp_path, seed=0)
    for site in ("north", "south"):
        share = federation.clients[site]
        assert [federation.table.rows[row] for row in share.test] == [f"{site}/test.csv:2"]
        assert len(share.train) == 10
        assert share.validation == []


def test_a_test_file_among_the_matches_is_no_client(tmp_path: Path) -> None:
    write(tmp_path, a__csv=GOOD, test__csv="text,label\nx,yes\n")
    federation = load(Data(source="*.csv", test="test.csv", clients=1), tmp_path, seed=0)
    assert [len(share.test) for share in federation.clients.values()] == [1]
    assert "name the same files" in error_of(tmp_path, "test.csv", test="test.csv")


def test_a_client_column_beats_the_files(tmp_path: Path) -> None:
    write(tmp_path, a__csv="text,label,ward\nx,1,w1\ny,2,w1\nz,1,\n", b__csv="text,label,ward\nx,1,w2\ny,2,w1\n")
    federation = load(Data(source="?.csv", client="ward"), tmp_path, seed=0)
    assert list(federation.clients) == ["w1", "w2"]
    assert federation.table.notices == ("a.csv: 1 row without a client was left out (first: line 4)",)


def test_the_split_column_is_kept(tmp_path: Path) -> None:
    rows = [f"t{i},{i % 2},{part}" for i, part in enumerate(["train"] * 6 + ["dev"] * 2 + ["Test"] * 2)]
    write(tmp_path, a__csv="\n".join(["text,label,fold", *rows]))
    federation = load(Data(source="a.csv", split="fold", clients=1), tmp_path, seed=0)
    share = federation.clients["client-00"]
    assert (share.train, share.validation, share.test) == ([0, 1, 2, 3, 4, 5], [6, 7], [8, 9])


def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path: Path) -> None:
    write(
        tmp_path,
        a__jsonl='{"text":"a","label":1}\n{"text":" ","label":1}\n{"text":"b"}\n{"text":"c","label":NaN}\n',
    )
    table = table_of(tmp_path, "a.jsonl")
    assert list(table.inputs) == ["a"]
    assert table.notices == (
        "a.jsonl: 1 row without a text was left out (first: line 2)",
        "a.jsonl: 2 rows without a label were left out (first: line 3)",
    )


def test_a_lone_surrogate_is_a_text_that_can_be_tokenised(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl='{"text":"a \\ud800 b","label":1}\n', b__jsonl='{"text":"a \\udfff b","label":1}\n')
    one, other = (table_of(tmp_path, name) for name in ("a.jsonl", "b.jsonl"))
    assert one.inputs[0].split() == ["a", "\ufffd" * 3, "b"]
    assert one.inputs[0].encode("utf-8") == other.inputs[0].encode("utf-8")
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("content", ["", "text,label\n", "text,label\n,yes\n"])
def test_an_empty_client_file_is_excluded_and_reported(tmp_path: Path, content: str) -> None:
    write(tmp_path, a__csv=GOOD, empty__csv=content)
    federation = load(Data(source="*.csv"), tmp_path, seed=0)
    assert list(federation.clients) == ["a"]
    assert list(federation.excluded) == ["empty"]
    assert "empty.csv holds no" in federation.excluded["empty"]


def test_the_test_rows_of_an_empty_client_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write(tmp_path, a__csv=GOOD, b__csv="text,label\n", c__csv=GOOD)
    write(tmp_path / "t", a__csv=GOOD, b__csv=GOOD, c__csv="")
    federation = load(Data(source="*.csv", test="t/*.csv"), tmp_path, seed=0)
    assert {client: len(share.test) for client, share in federation.clients.items()} == {"a": 10, "c": 0}
    assert federation.excluded == {"b": "b.csv holds no rows"}
    assert federation.notices == ("t/c.csv holds no rows", "1 client without test rows: 'c'")


def test_a_client_of_one_class_and_a_tiny_client_are_reported(tmp_path: Path) -> None:
    write(tmp_path, a__csv=GOOD, one__csv="text,label\n" + "x,yes\n" * 5, two__csv="text,label\nx,yes\ny,no\n")
    federation = load(Data(source="*.csv"), tmp_path, seed=0)
    assert list(federation.clients) == ["a", "one", "two"]
    assert federation.notices == (
        "1 client with training rows of one label only: 'one'",
        "1 client without validation rows: 'two'",
        "1 client without test rows: 'two'",
    )


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, bank__csv=GOOD)
    assert f"no file 'bnak.csv'; the folder {tmp_path} holds 'bank.csv'. Did you mean 'bank.csv'?" in error_of(
        tmp_path, "bnak.csv"
    )
    assert "does not exist. Paths start at" in error_of(tmp_path, "nowhere/bank.csv")
    assert "no file matches 'sites/*.csv'" in error_of(tmp_path, "sites/*.csv")
    (tmp_path / "folder").mkdir()
    assert "'folder' is a folder" in error_of(tmp_path, "folder")
    assert "'folder/*.csv'" in error_of(tmp_path, "folder")


def test_an_unknown_format_or_source_is_named(tmp_path: Path) -> None:
    write(tmp_path, a__xlsx="")
    assert "found the ending '.xlsx', expected '.csv', '.csv.gz'" in error_of(tmp_path, "a.xlsx")
    assert "Did you mean 'docstrings'?" in error_of(tmp_path, "docstring")


def test_a_missing_column_lists_the_columns(tmp_path: Path) -> None:
    write(tmp_path, a__csv="Txt,target\na,b\n", b__csv="text;label\na;b\n")
    message = error_of(tmp_path, "a.csv", text="text")
    assert "a.csv has no column 'text'; its columns are 'Txt', 'target'. Did you mean 'Txt'?" in message
    assert 'Set `text = "…"` in [data]' in message
    assert 'Set `label = "…"`' in error_of(tmp_path, "a.csv", text="Txt")
    assert "does not look separated by commas" in error_of(tmp_path, "b.csv")


def test_columns_that_differ_among_files_name_both(tmp_path: Path) -> None:
    write(tmp_path, a__csv=GOOD, b__csv=GOOD.replace("label", "target"))
    assert "b.csv has no column 'label'; its columns are 'text', 'target'. a.csv has it" in error_of(tmp_path, "*.csv")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    line = '{"text": "a", "label": "b"}\n'
    write(tmp_path, a__jsonl=line + '{"text": \n', b__jsonl="[" + line + "]", c__jsonl=line + "3\n")
    assert "a.jsonl:2: not JSON: Expecting value" in error_of(tmp_path, "a.jsonl")
    assert "not one array" in error_of(tmp_path, "b.jsonl")
    assert "c.jsonl:2: found a JSON int, expected one object a line" in error_of(tmp_path, "c.jsonl")
    write(
        tmp_path,
        a__csv="text,label\na,b\none, two,c\n",
        b__csv='text,label\na,b\n"open,b\nx,y\n',
        c__csv="text,text,label\na,b,c\n",
    )
    assert "a.csv:3: found 3 values, expected 2" in error_of(tmp_path, "a.csv")
    assert "b.csv:3: not CSV" in error_of(tmp_path, "b.csv")
    assert "names the column 'text' twice" in error_of(tmp_path, "c.csv")


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\na,b\nGrüße,c\n".encode("cp1252"))
    (tmp_path / "b.csv").write_bytes(GOOD.encode("utf-16"))
    message = error_of(tmp_path, "a.csv")
    assert "a.csv:3: found the byte 0xfc, which is not UTF-8" in message
    assert "iconv -f CP1252" in message
    assert "iconv -f UTF-16" in error_of(tmp_path, "b.csv")


def test_damaged_gzip_and_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    (tmp_path / "b.csv.gz").write_bytes(GOOD.encode())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    assert "a.csv.gz cannot be read" in error_of(tmp_path, "a.csv.gz")
    assert "b.csv.gz cannot be read: Not a gzipped file" in error_of(tmp_path, "b.csv.gz")
    assert "a.parquet cannot be read as Parquet" in error_of(tmp_path, "a.parquet")


def test_values_of_the_wrong_kind_are_named(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl='{"text": 3, "label": "b"}', b__jsonl='{"text": "a", "label": ["b"]}')
    assert "a.jsonl:1: column 'text' holds a value of type int, expected a text" in error_of(tmp_path, "a.jsonl")
    assert "b.jsonl:1: column 'label' holds a list, expected one name or number" in error_of(tmp_path, "b.jsonl")


def test_a_source_without_usable_rows_says_why(tmp_path: Path) -> None:
    write(tmp_path, a__csv="text,label\n", b__csv="text,label\na,\n")
    assert "found no usable row: a.csv holds no rows" in error_of(tmp_path, "a.csv")
    assert "b.csv: 1 row without a label was left out" in error_of(tmp_path, "b.csv")
    write(tmp_path, good__csv=GOOD)
    assert "test = 'a.csv' holds no usable row" in error_of(tmp_path, "good.csv", test="a.csv")


def test_a_label_or_group_seen_only_in_test_is_named(tmp_path: Path) -> None:
    write(tmp_path, a__csv=GOOD, b__csv=GOOD, test__csv="text,label\nx,yes\ny,yess\n")
    message = error_of(tmp_path, "a.csv", test="test.csv", clients=2)
    assert "the label 'yess' is seen in 1 test row (first: test.csv:3) and in no training row" in message
    assert "Did you mean 'yes'?" in message
    write(tmp_path, test__csv="text,label\nx,yes\n")
    message = error_of(tmp_path, "[ab].csv", test="test.csv")
    assert "1 row of 'test' (first: test.csv:2) would have no client" in message
    assert "Clients with training rows: 'a', 'b'" in message


def test_partitions_that_cannot_be_say_what_can(tmp_path: Path) -> None:
    write(tmp_path, a__csv=GOOD, one__csv="text,label\na,x\nb,x\n", t__csv="text,label,fold\na,b,test\n")
    assert "found 10 training rows for 11 clients" in error_of(tmp_path, "a.csv", clients=11)
    assert "name the column by `client`" in error_of(tmp_path, "a.csv", partition="natural").lower()
    assert "between 1 and 2" in error_of(tmp_path, "a.csv", partition="classes", classes_per_client=3)
    assert "the label of all training rows (2) is 'x'" in error_of(tmp_path, "one.csv", clients=1)
    assert "found no training row" in error_of(tmp_path, "t.csv", split="fold")
    write(tmp_path, t__csv="text,label,fold\na,b,holdout\n")
    assert "t.csv:2: column 'fold' holds 'holdout', expected one of 'train'" in error_of(
        tmp_path, "t.csv", split="fold"
    )


def test_a_column_of_unique_labels_is_suspicious(tmp_path: Path) -> None:
    write(tmp_path, a__csv="text,label\n" + "".join(f"a,{i}\n" for i in range(10)))
    federation = load(Data(source="a.csv", clients=2), tmp_path, seed=0)
    assert any("10 different labels in 10 rows" in notice for notice in federation.notices)


def png(side: int, shade: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side), shade if mode == "L" else (shade, 0, 255)).save(out, "PNG")
    return out.getvalue()


def test_images_are_read_from_bytes_whatever_their_format(tmp_path: Path) -> None:
    cells = [png(4, 10), {"bytes": png(4, 20), "path": None}, None, png(4, 30, "L")]
    for name, image in (("plain", cells[0]), ("nested", cells[1])):
        pq.write_table(pa.Table.from_pylist([{"image": image, "label": 1}]), tmp_path / f"{name}.parquet")
    rows = [{"image": cell, "label": number} for number, cell in enumerate((cells[0], cells[2], cells[3]))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = table_of(tmp_path, "a.parquet", image="image")
    assert isinstance(table.inputs, ImageFiles)
    assert (table.inputs.dtype, len(table.inputs), table.inputs.shape) == (torch.uint8, 2, (3, 4, 4))
    assert [table.inputs[row][:, 0, 0].tolist() for row in (0, 1)] == [[10, 0, 255], [30, 30, 30]]
    assert table.labels == ["0", "2"]
    assert "1 row without an image was left out" in table.notices[0]
    assert table_of(tmp_path, "nested.parquet", image="image").inputs[0][:, 0, 0].tolist() == [20, 0, 255]


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ([b"no image"], "holds no readable image"),
        (["text"], "expected the bytes of an image file"),
    ],
)
def test_images_that_cannot_be_used_are_named(tmp_path: Path, cells: list[object], says: str) -> None:
    pq.write_table(pa.Table.from_pylist([{"image": cell, "label": 1} for cell in cells]), tmp_path / "a.parquet")
    assert says in error_of(tmp_path, "a.parquet", image="image")
    assert f"a.parquet:{len(cells)}" in error_of(tmp_path, "a.parquet", image="image")


def test_images_of_unlike_size_have_no_common_shape(tmp_path: Path) -> None:
    cells = [png(4, 1), png(4, 2), png(6, 1), png(5, 1)]
    pq.write_table(pa.Table.from_pylist([{"image": cell, "label": 1} for cell in cells]), tmp_path / "a.parquet")
    table = table_of(tmp_path, "a.parquet", image="image")
    assert [tuple(table.inputs[row].shape) for row in range(4)] == [(3, 4, 4), (3, 4, 4), (3, 6, 6), (3, 5, 5)]
    with pytest.raises(DataError, match=r"a\.parquet:3: found an image of 6 × 6 pixels, expected 4 × 4 as before"):
        _ = table.inputs.shape


def test_an_image_that_is_damaged_behind_its_header_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    cells = [png(40, 1), png(40, 2)[:-30]]
    pq.write_table(pa.Table.from_pylist([{"image": cell, "label": 1} for cell in cells]), tmp_path / "a.parquet")
    table = table_of(tmp_path, "a.parquet", image="image")
    assert table.inputs[0].shape == (3, 40, 40)
    for decode in (lambda: table.inputs[1], table.fingerprint):
        with pytest.raises(DataError, match=r"a\.parquet:2: column 'image' holds no readable image: "):
            decode()


def test_of_many_files_one_is_open_at_a_time() -> None:
    open_now: set[str] = set()
    most = 0

    def records(name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
        nonlocal most
        open_now.add(name)
        most = max(most, len(open_now))
        columns_of[name].append("text")
        yield 1, {"text": f"of {name}", "label": "x"}
        open_now.discard(name)

    columns_of: dict[str, list[str]] = {f"{number}.jsonl": [] for number in range(50)}
    sheets = [Sheet(name, known, records(name)) for name, known in columns_of.items()]
    table = gather(sheets, named(Data(source="*.jsonl", label="text"), [TEXTS]))
    assert len(table) == 50
    assert most == 1


def test_where_no_form_fits_the_message_is_about_the_one_that_fits_best(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    forms = [Form(dict.fromkeys(roles, "text")) for roles in (("messages",), ("prompt", "completion"))]
    with pytest.raises(DataError, match="has no column 'completion'"):
        read(Data(source="rows.jsonl"), tmp_path, forms)
