"""Embedded sources, the Hub (with a stand-in for `datasets`), the [data] section and the table itself."""

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from celora.data import Data, Table, docstrings, libraries, load, read
from celora.data.docstrings import MASK, read_docstrings
from celora.data.inputs import PixelArrays, Texts
from celora.errors import DataError

HERE = Path()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of our own, and a quick recipe: 10 texts for each library."""
    monkeypatch.setattr(docstrings, "PER_LIBRARY", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "celora"


def test_docstrings_are_balanced_masked_distinct_and_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_docstrings()
    assert Counter(table.labels) == dict.fromkeys(libraries.LIBRARIES, 10)
    assert isinstance(table.inputs, Texts)
    for text in table.inputs:
        assert 5 <= len(text.split()) <= 60
        assert text.isascii()
        assert not any(
            name.lower() in text.lower() for name in libraries.LIBRARIES if name not in ("rich", "transformers")
        )
    assert len({" ".join(text.lower().split()[:6]) for text in table.inputs}) == len(table)
    assert len(list(cache.iterdir())) == 1  # no temporary file is left behind
    monkeypatch.setattr(docstrings, "_build", lambda: pytest.fail("the cache was not used"))
    again = read_docstrings()
    assert again.fingerprint() == table.fingerprint()
    assert again.rows == table.rows


def test_a_damaged_cache_is_made_anew_and_a_folder_that_cannot_be_written_is_no_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = {"inputs": ["a b c d e", "f g h i j"], "labels": ["x", "y"], "rows": ["r1", "r2"], "notices": []}
    monkeypatch.setattr(docstrings, "_build", lambda: small)
    fingerprint = read_docstrings().fingerprint()
    file = next(cache.iterdir())
    content = json.loads(file.read_text())
    for damage in (
        "",
        "[]",
        '{"columns": 3}',
        json.dumps({**content, "columns": {**small, "labels": ["x", "x"]}}),
        '{"columns": [1]',
    ):
        file.write_text(damage)
        assert read_docstrings().fingerprint() == fingerprint
        assert json.loads(file.read_text()) == content
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert read_docstrings().labels == ["x", "y"]


def test_too_few_documented_libraries_are_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "LIBRARIES", {"pydantic": "pydantic", "no_such_library": "none"})
    with pytest.raises(DataError, match=r"only 1 libraries .*'pydantic'; too few: no_such_library \(0\)"):
        read_docstrings()


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("A PyTorch  module.\n\nMore.", f"A {MASK} module."),
        (
            "See :class:`scipy.sparse.csr_matrix` and scikit-learn's np.ndarray",
            f"See :class:`{MASK}` and {MASK}'s {MASK}",
        ),
        ("Enriched plots with plt.plot, NumPy, HfApi", f"Enriched plots with {MASK}, {MASK}, {MASK}"),
        ('!!! abstract "Docs"\n    [a](b)\n\nThe text.', "The text."),
    ],
)
def test_names_of_libraries_are_masked(docstring: str, text: str) -> None:
    assert docstrings._clean(docstring) == text


def test_libraries_are_read_and_not_imported(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("__init__.py", "tests/test_a.py"):
        file = tmp_path / "explosive" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text('raise SystemExit\ndef f():\n    """Light the fuse and run away."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    found = docstrings._harvest("explosive", set())
    assert [(one.text, one.row) for one in found] == [("Light the fuse and run away.", "explosive/__init__.py:f")]


@pytest.mark.slow
def test_the_whole_docstrings_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counts = Counter(read_docstrings().labels)
    assert len(counts) >= 10
    assert set(counts.values()) == {400}


def test_digits_are_small_images() -> None:
    table = read(Data(source="digits"), HERE)
    assert isinstance(table.inputs, PixelArrays)
    assert (len(table.inputs), table.inputs.shape, table.inputs.dtype) == (1797, (1, 8, 8), torch.float32)
    images = torch.stack([table.inputs[row] for row in range(1797)])
    assert (images.min(), images.max()) == (0, 1)
    federation = load(Data(source="digits", clients=4, rows=50, max_test=20), HERE, seed=1)
    assert set(federation.table.labels) == {str(digit) for digit in range(10)}
    assert all(len(share.train) <= 50 and len(share.test) <= 20 for share in federation.clients.values())


class Split:
    """As much of a Hub data set as celora uses."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, object]) -> None:
        self.rows, self.features, self.column_names = rows, features, list(features)

    def select_columns(self, names: list[str]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in names} for row in self.rows]


class ClassLabel:
    names = ("neg", "pos")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub of one data set; the arguments of the last call are under "asked"."""
    features = {"sentence": "string", "label": ClassLabel(), "idx": "int"}
    store: dict[str, Any] = {
        "train": Split([{"sentence": f"s{i}", "label": i % 2, "idx": i} for i in range(20)], features),
        "validation": Split([{"sentence": "v", "label": 1, "idx": 0}] * 4, features),
        "test": Split([{"sentence": "t", "label": -1, "idx": 0}] * 3, features),
        "unsupervised": Split([], features),
    }

    def load_dataset(path: str, name: str | None, *, revision: str | None) -> dict[str, Any]:
        store["asked"] = (path, name, revision)
        if path != "glue":
            raise ConnectionError("no network")
        return {split: content for split, content in store.items() if isinstance(content, Split)}

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=load_dataset, ClassLabel=ClassLabel),
    )
    return store


def test_a_hub_data_set_keeps_its_labelled_splits(hub: dict[str, Any]) -> None:
    federation = load(Data(source="hub:glue:sst2@v1", text="sentence", clients=2, partition="iid"), HERE, seed=0)
    assert hub["asked"] == ("glue", "sst2", "v1")
    assert set(federation.table.labels) == {"neg", "pos"}
    assert federation.table.rows[0] == "glue/train:1"
    assert federation.table.splits is not None
    assert Counter(federation.table.splits) == {"train": 20, "validation": 4}
    assert [len(share.test) for share in federation.clients.values()] == [
        2,
        2,
    ]  # by share: the Hub's has no labels
    assert sum(len(share.validation) for share in federation.clients.values()) == 4
    assert federation.notices == (
        "glue: the splits 'unsupervised' were left out",
        "glue/test: 3 rows without a label were left out (first: row 1)",
        "glue/test holds no usable row",
    )


@dataclass(frozen=True)
class HubImage:
    """A feature of images; they are given as files where `decode` is off."""

    decode: bool = True


class ImageSplit(Split):
    """Its images come decoded, as those of `datasets` do, unless their column is cast."""

    def select_columns(self, names: list[str]) -> Any:
        return ImageSplit(self.rows, {name: self.features[name] for name in names})

    def cast_column(self, name: str, feature: HubImage) -> Any:
        return ImageSplit(self.rows, {**self.features, name: feature})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield row if self.features["picture"] == HubImage(decode=False) else {**row, "picture": object()}


def test_images_of_a_hub_data_set_come_as_files(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (7, 8, 9)).save(file, "PNG")
    rows = [{"picture": {"bytes": file.getvalue(), "path": None}, "label": number % 2} for number in range(4)]
    hub["train"] = ImageSplit(rows, {"picture": HubImage(), "label": ClassLabel()})
    for split in ("validation", "test", "unsupervised"):
        del hub[split]
    monkeypatch.setattr(sys.modules["datasets"], "Image", HubImage, raising=False)
    table = read(Data(source="hub:glue", image="picture"), HERE)
    assert (table.labels, table.splits) == (["neg", "pos"] * 2, ["train"] * 4)
    assert table.inputs[3][:, 2, 2].tolist() == [7, 8, 9]


def test_hub_errors_say_what_to_do(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'ag_news' cannot be loaded: ConnectionError: no network"):
        read(Data(source="hub:ag_news"), HERE)
    with pytest.raises(DataError, match="glue/train has no column 'text'; its columns are 'sentence'"):
        read(Data(source="hub:glue"), HERE)
    del hub["train"]
    with pytest.raises(DataError, match="expected 'train' among them"):
        read(Data(source="hub:glue"), HERE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "celora\[hub\]"'):
        read(Data(source="hub:glue"), HERE)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"validation": 0.5, "test_share": 0.5}, r"validation \+ test_share = 1 leaves no row"),
        (
            {"source": "docstrings", "columns": {"pair": "other"}},
            "columns cannot be set with source = 'docstrings'; remove it",
        ),
        ({"source": "digits", "image": "picture"}, "image cannot be set with source = 'digits'; remove it"),
        (
            {"source": "a.csv", "image": "picture", "columns": {"pair": "other"}},
            "image and columns.pair both say what is read of a row; set one of them",
        ),
        ({"source": "digits", "client": "ward"}, "client cannot be set with source = 'digits'"),
        (
            {"source": "hub:glue", "test": "a.csv", "split": "fold"},
            "test and split cannot be set with source",
        ),
        ({"source": "a.csv", "test": "b.csv", "split": "fold"}, "test and split both say"),
        ({"alpha": 0}, "greater than 0"),
        ({"rows": 0}, "greater than or equal to 1"),
        ({"partition": "dirichlett"}, "Input should be 'auto'"),
        ({"colour": "red"}, "Unexpected keyword argument"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Data(**section)


def test_every_field_has_help() -> None:
    fields = Data.__pydantic_fields__
    assert all(field.description for field in fields.values())


def test_the_fingerprint_is_of_the_contents() -> None:
    table = Table(Texts(["ab", "c"]), ["x", "y"], None, None, ["f:1", "f:2"])
    assert replace(table, rows=["g:1", "g:2"], notices=("n",)).fingerprint() == table.fingerprint()
    others = [
        replace(table, inputs=Texts(["a", "bc"])),
        replace(table, inputs=PixelArrays(torch.zeros(2, 1))),
        replace(table, inputs=PixelArrays(torch.ones(2, 1))),
        replace(table, labels=["y", "x"]),
        replace(table, groups=["x", "y"]),
        replace(table, splits=["x", "y"]),
    ]
    assert len({one.fingerprint() for one in [table, *others]}) == 7
