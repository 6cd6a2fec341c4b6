"""Images that are files in folders, `photos/<client>/<label>/<name>.png`, and arrays in an .npz file."""

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celora.data.columns import Sheet
from celora.errors import DataError
from celora.lazy import Lazy, np

pillow = Lazy("PIL.Image")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_CHANNELS = (1, 3, 4)


def image_file(path: Path, name: str, column: str, label: str, client: str | None) -> Sheet:
    """An image file as one row: its label is its folder's name, its client the name of the folder above that.

    Args:
        name: of the file, for messages.
        column, label, client: what the three columns are called.
    """

    def records() -> Iterator[tuple[int, Mapping[str, object]]]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error}. Check its permissions, or copy it again.") from error
        values: dict[str, object] = {column: content, label: path.parent.name}
        yield 1, values if client is None else {**values, client: path.parent.parent.name}

    return Sheet(name, [one for one in (column, label, client) if one is not None], records(), unit="image")


def arrays(path: Path, name: str, column: str | None) -> Sheet:
    """The arrays of an .npz file as columns, a row for each of their first axis; images become PNG or TIFF files.

    Args:
        name: of the file, for messages.
        column: the one of images, (n, height, width), (n, height, width, channels) or (n, channels, height, width).

    Raises:
        DataError: if the file cannot be read, or its arrays are of unlike length.
    """
    with _opened(path, name) as file:
        columns = {one: file[one] for one in file.files}
    lengths = {one: array.shape[0] if array.ndim else 0 for one, array in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{one} ({length})" for one, length in lengths.items())
        raise DataError(f"{name}: its arrays are of unlike length: {found}; expected one value of each for every row.")

    def records() -> Iterator[tuple[int, Mapping[str, object]]]:
        for row in range(max(lengths.values(), default=0)):
            where = f"{name}:{row + 1}"
            yield (
                row + 1,
                {
                    one: _file(array[row], one, where) if one == column else array[row].item()
                    for one, array in columns.items()
                    if one == column or array.ndim == 1
                },
            )

    return Sheet(name, list(columns), records(), unit="row")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{name} cannot be read as .npz: {error}. Write plain arrays again by numpy.savez.") from error


def _file(pixels: Any, column: str, where: str) -> bytes:
    """An array as the image file that keeps its numbers: PNG, or TIFF for floats."""
    if pixels.ndim == 3 and pixels.shape[0] in _CHANNELS and pixels.shape[-1] not in _CHANNELS:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    grey = pixels.ndim == 2
    if not (grey or (pixels.ndim == 3 and pixels.shape[-1] in _CHANNELS)):
        raise DataError(
            f"{where}: column {column!r} holds an array {pixels.shape}, expected an image (height, width), "
            "(height, width, channels) or (channels, height, width)."
        )
    if pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32)
        if not grey:
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise DataError(
                    f"{where}: column {column!r} holds floats from {pixels.min():g} to {pixels.max():g}, expected 0 "
                    "(black) to 1 (white)."
                )
            pixels = (pixels * 255).round().astype(np.uint8)
    elif pixels.dtype not in ((np.bool_, np.uint8, np.uint16) if grey else (np.uint8,)):
        raise DataError(
            f"{where}: column {column!r} holds an image of {pixels.dtype}, which does not say what is white; expected "
            "uint8, uint16 (one channel), or floats from 0 to 1."
        )
    out = io.BytesIO()
    pillow.fromarray(pixels).save(out, "TIFF" if pixels.dtype.kind == "f" else "PNG", compress_level=1)
    return out.getvalue()
