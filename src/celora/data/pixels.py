"""An image file as 8-bit RGB pixels: whatever mode it has is read as it is meant, or refused.

Grey, palette, CMYK       as Pillow converts them
transparency              lies on white
16 bits                   scaled to 8, not cut off
float                     0 is black and 1 is white
EXIF orientation          turned upright
32-bit integers, LAB      refused: nothing says what is white; and so are files of several images
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from celora.lazy import Lazy, np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
pillow, pillow_ops = Lazy("PIL.Image"), Lazy("PIL.ImageOps")

_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112
"""The EXIF tag; 5 to 8 exchange height and width."""


def measured(content: bytes) -> tuple[int, int]:
    """(height, width) of an upright image file, by its header alone.

    Raises:
        OSError: if it is no image.
        ValueError: if its mode says not what is meant, or it holds several images.
    """
    with pillow.open(io.BytesIO(content)) as opened:
        _check(opened)
        height, width = opened.height, opened.width
        return (width, height) if _orientation(opened) >= 5 else (height, width)


def decoded(content: bytes) -> NDArray[np.uint8]:
    """The pixels (height, width, 3) of an image file.

    Raises:
        OSError: if it is damaged.
        ValueError: if its numbers say not what is meant.
    """
    with pillow.open(io.BytesIO(content)) as opened:
        orientation = _orientation(opened)
        image = _rgb(opened)
    if orientation != 1:
        image.getexif()[_ORIENTATION] = orientation
        pillow_ops.exif_transpose(image, in_place=True)
    return np.array(image)


def _check(image: Image) -> None:
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode not in (*_PLAIN, "F") and not deep:
        raise ValueError(
            f"found a {image.format} of mode {image.mode}, which does not say what is white; expected 8 or 16 bits a "
            "channel, or floats from 0 to 1: save it as one of these"
        )
    if image.format == "MPO":  # a camera's photograph, with its preview behind it
        return
    try:
        image.seek(1)
    except EOFError:
        return
    raise ValueError(f"found a {image.format} of several images, expected one: save the one that is meant")


def _orientation(image: Image) -> int:
    """1 to 8, as EXIF counts; Pillow turns a TIFF by itself."""
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except SyntaxError:  # Pillow's word for notes that are damaged; the pixels need not be
        return 1
    return found if found in range(1, 9) else 1


def _rgb(image: Image) -> Image:
    if image.mode == "F":
        numbers = np.array(image)
        low, high = numbers.min(), numbers.max()
        if not (low >= 0 and high <= 1):  # nor if one of them is no number
            raise ValueError(f"found floats from {low:g} to {high:g}, expected 0 (black) to 1 (white)")
        return _grey((numbers * 255).round())
    if image.mode.startswith("I"):
        return _grey((np.array(image).astype(np.uint32) + 128) // 257)
    if image.has_transparency_data:
        white = pillow.new("RGBA", image.size, "white")
        return pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")  # type: ignore[no-any-return]
    return image.convert("RGB")


def _grey(numbers: NDArray[Any]) -> Image:
    return pillow.fromarray(numbers.astype(np.uint8)).convert("RGB")  # type: ignore[no-any-return]
