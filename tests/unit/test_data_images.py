"""Images of every mode are read as they are meant, or refused by name."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from celora.data import Data, read
from celora.data.table import Table
from celora.errors import DataError


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def table_of(folder: Path, *files: bytes) -> Table:
    rows = [{"image": content, "label": "x"} for content in files]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return read(Data(source="rows.parquet", image="image"), folder)


def colour(folder: Path, content: bytes) -> list[int]:
    """Of the first pixel."""
    found: list[int] = table_of(folder, content).inputs[0][:, 0, 0].tolist()  # type: ignore[union-attr]
    return found


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (file_of(Image.new("L", (4, 4), 77)), [77] * 3),
        (file_of(Image.new("1", (4, 4), 1)), [255] * 3),
        (file_of(palette()), [200, 100, 50]),
        (file_of(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
        (file_of(Image.fromarray(np.full((4, 4), 30_000, np.uint16))), [117] * 3),
        (file_of(Image.fromarray(np.full((4, 4), 65_535, np.uint16)), "TIFF"), [255] * 3),
        (file_of(Image.fromarray(np.full((4, 4), 0.2, np.float32)), "TIFF"), [51] * 3),
    ],
    ids=["grey", "black and white", "palette", "CMYK", "16 bits", "16 bits, TIFF", "float"],
)
def test_the_modes_of_an_image_are_read_as_they_are_meant(tmp_path: Path, content: bytes, expected: list[int]) -> None:
    assert colour(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (file_of(Image.new("RGBA", (4, 4), (9, 9, 9, 0))), [255] * 3),
        (file_of(Image.new("RGBA", (4, 4), (0, 0, 0, 51))), [204] * 3),
        (file_of(Image.new("LA", (4, 4), (10, 255))), [10] * 3),
        (file_of(palette(), transparency=1), [255] * 3),
        (file_of(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), [255] * 3),
    ],
    ids=["clear", "a fifth black", "opaque", "palette", "one colour"],
)
def test_what_is_transparent_lies_on_white(tmp_path: Path, content: bytes, expected: list[int]) -> None:
    assert colour(tmp_path, content) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photograph_is_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    """Left half black, right half white, 16 wide and 8 high, before it is turned."""
    image = Image.fromarray(np.repeat([[[0] * 3, [255] * 3]], 8, axis=1).reshape(1, 16, 3).repeat(8, 0).astype("uint8"))
    notes = Image.Exif()
    notes[0x0112] = orientation
    images = table_of(tmp_path, file_of(image, kind, exif=notes)).inputs
    black, white = {
        1: ((4, 0), (4, 15)), 2: ((4, 15), (4, 0)), 3: ((4, 15), (4, 0)), 4: ((4, 0), (4, 15)),
        5: ((0, 4), (15, 4)), 6: ((0, 4), (15, 4)), 7: ((15, 4), (0, 4)), 8: ((15, 4), (0, 4)),
    }[orientation]  # fmt: skip
    assert images.shape == images[0].shape == ((3, 8, 16) if orientation < 5 else (3, 16, 8))  # type: ignore[union-attr]
    assert images[0][0, *black] < 20  # type: ignore[union-attr,index]
    assert images[0][0, *white] > 235  # type: ignore[union-attr,index]


def test_damaged_notes_leave_the_pixels_as_they_are(tmp_path: Path) -> None:
    content = file_of(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", exif=b"Exif\0\0XX*\0\x08\0\0\0")
    assert colour(tmp_path, content) == [255, 0, 0]


FRAMES = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 200)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (file_of(Image.fromarray(np.full((4, 4), 9, np.int32)), "TIFF"), "found a TIFF of mode I, which does not say"),
        (file_of(Image.new("LAB", (4, 4)), "TIFF"), "found a TIFF of mode LAB, which does not say what is white"),
        *(
            (file_of(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:]), f"found a {kind} of several images")
            for kind in ("GIF", "PNG", "WEBP", "TIFF")
        ),
    ],
)
def test_what_does_not_say_what_it_means_is_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    good = file_of(FRAMES[0])
    with pytest.raises(DataError, match=rf"rows\.parquet:2: column 'image' holds no readable image: {says}"):
        table_of(tmp_path, good, content)


@pytest.mark.parametrize("numbers", [[0.0, 1.5], [-0.1, 1.0], [0.0, np.nan]])
def test_floats_beyond_black_and_white_are_refused_by_name(tmp_path: Path, numbers: list[float]) -> None:
    content = file_of(Image.fromarray(np.array([numbers], np.float32)), "TIFF")
    with pytest.raises(DataError, match=r"rows\.parquet:1: .* found floats from .* expected 0 \(black\)"):
        colour(tmp_path, content)


def test_a_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"rows\.parquet:1: column 'image' holds no readable image: .*truncated"):
        colour(tmp_path, file_of(noise, "JPEG")[:-400])


def photographs(folder: Path) -> None:
    """Two clients with two labels and two images each, and a note that is none."""
    for client in ("north", "south"):
        for shade, label in enumerate(("cat", "dog")):
            place = folder / client / label
            place.mkdir(parents=True)
            for number in (2, 10):
                content = file_of(Image.new("RGB", (4, 4), (100 * shade + number, 0, 0)))
                (place / f"{number}.{'PNG' if number == 2 else 'png'}").write_bytes(content)
    (folder / "notes.txt").write_text("not an image")


@pytest.mark.parametrize("source", ["photos", "photos/**/*.[pP][nN][gG]"])
def test_a_folder_of_images_has_its_folders_as_labels_and_those_above_as_clients(tmp_path: Path, source: str) -> None:
    photographs(tmp_path / "photos")
    table = read(Data(source=source, image="image", client="site"), tmp_path)
    assert table.labels == ["cat", "cat", "dog", "dog"] * 2
    assert table.groups == ["north"] * 4 + ["south"] * 4
    assert table.rows[1] == "photos/north/cat/10.png:1"
    assert [int(table.inputs[row][0, 0, 0]) for row in range(4)] == [2, 10, 102, 110]  # type: ignore[union-attr]
    assert read(Data(source=source, image="image"), tmp_path).groups is None


def test_images_in_folders_of_their_own_are_test_images(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    table = read(Data(source="photos/north", test="photos/south", image="image"), tmp_path)
    assert table.splits == ["train"] * 4 + ["test"] * 4


def test_what_is_wrong_with_a_folder_of_images_is_said(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    with pytest.raises(DataError, match=r'cat/2\.PNG is an image: set `image = "image"` in \[data\]'):
        read(Data(source="photos"), tmp_path)
    (tmp_path / "photos" / "north" / "cat" / "2.PNG").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"photos/north/cat/2\.PNG:1: column 'image' holds no readable image"):
        read(Data(source="photos", image="image"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="'empty' is a folder that holds no image"):
        read(Data(source="empty", image="image"), tmp_path)


RAMP = np.arange(2 * 3 * 4).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("images", "shape", "expected"),
    [
        (RAMP.astype(np.uint8), (3, 3, 4), [6, 6, 6]),
        ((RAMP * 257).astype(np.uint16), (3, 3, 4), [6, 6, 6]),
        ((RAMP / 255).astype(np.float64), (3, 3, 4), [6, 6, 6]),
        (RAMP[..., None].astype(np.uint8), (3, 3, 4), [6, 6, 6]),
        (np.stack([RAMP, RAMP + 1, RAMP + 2], -1).astype(np.uint8), (3, 3, 4), [6, 7, 8]),
        (np.stack([RAMP, RAMP + 1, RAMP + 2], -1)[:, :2].astype(np.uint8), (3, 2, 4), [6, 7, 8]),
        (np.stack([np.tile(RAMP, (1, 2, 2)) + c for c in range(3)], 1) / 255, (3, 6, 8), [6, 7, 8]),
        (RAMP % 2 == 0, (3, 3, 4), [255, 255, 255]),
    ],
    ids=["uint8", "uint16", "float", "one channel", "last", "two rows", "channels first, float", "bool"],
)
def test_arrays_are_images_with_their_numbers(tmp_path: Path, images: Any, shape: Any, expected: list[int]) -> None:
    np.savez(tmp_path / "rows.npz", picture=images, label=[3, 4], writer=["a", "b"], note=np.zeros((2, 2)))
    table = read(Data(source="rows.npz", image="picture", client="writer"), tmp_path)
    assert (table.labels, table.groups, table.rows[1]) == (["3", "4"], ["a", "b"], "rows.npz:2")
    assert table.inputs.shape == shape  # type: ignore[union-attr]
    assert table.inputs[0][:, 1, 2].tolist() == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": RAMP, "label": [1, 2]}, r"rows\.npz:1: column 'image' holds an image of int64, which does not say"),
        ({"image": RAMP[0, :1], "label": [1]}, r"holds an array \(4,\), expected an image \(height, width\)"),
        ({"image": RAMP.astype("uint8"), "label": [1]}, r"unlike length: image \(2\), label \(1\)"),
        ({"image": np.array([None, 1], object), "label": [1, 2]}, r"rows\.npz cannot be read as \.npz: Object arrays"),
        ({"images": RAMP.astype("uint8"), "label": [1, 2]}, r"no column 'image'; its columns are .* mean 'images'\?"),
        ({"image": np.full((1, 4, 4, 3), 2.0), "label": [1]}, r"holds floats from 2 to 2, expected 0 \(black\)"),
    ],
)
def test_arrays_that_are_no_images_are_refused_by_name(tmp_path: Path, columns: Any, says: str) -> None:
    np.savez(tmp_path / "rows.npz", **columns)
    with pytest.raises(DataError, match=says):
        read(Data(source="rows.npz", image="image"), tmp_path)
