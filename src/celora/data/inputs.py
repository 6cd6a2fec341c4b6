"""The texts or images of a table. They lie in Arrow (`ArrowColumn`) and are decoded each time they are asked for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from celora.data.arrow import ArrowColumn
from celora.data.pixels import decoded, measured
from celora.errors import DataError
from celora.lazy import Tensor, torch


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Take these bytes in."""


class Texts:
    """n texts: `texts[row]` is one of them, and iteration passes over all in order.

    A lone surrogate, which JSON may hold and no tokenizer takes, counts in the hash and is read as U+FFFD.
    """

    kind: Literal["text"] = "text"

    def __init__(self, texts: Iterable[str]) -> None:
        self._column = ArrowColumn(encoded(text) for text in texts)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> str:
        return self._column[row].decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return (content.decode("utf-8", "replace") for content in self._column)

    def add_to(self, digest: Digest) -> None:
        """Hash all texts."""
        add_strings(digest, len(self), self._column)


class Column(Protocol):
    """n byte strings, by position or from front to back (`ArrowColumn`)."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, row: int, /) -> bytes:
        """One of them."""

    def __iter__(self) -> Iterator[bytes]:
        """All in order."""


class ImagesBehind:
    """The images behind what else is known of each row of a column (`record`)."""

    def __init__(self, column: ArrowColumn) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> bytes:
        return _behind(self._column[row])

    def __iter__(self) -> Iterator[bytes]:
        return map(_behind, self._column)


def _behind(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


class Images(ABC):
    """n images: `images[row]` is its pixels (channels, height, width).

    Args:
        column: one byte string for each image.
        shape: (channels, height, width) of the first image.
        unlike: what to say of the first image that has another shape; None if all are alike.
    """

    kind: Literal["image"] = "image"
    dtype: torch.dtype

    def __init__(self, column: Column, shape: tuple[int, ...], unlike: str | None = None) -> None:
        self._column, self._shape, self._unlike = column, shape, unlike

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of every image.

        Raises:
            DataError: naming the first image that has another shape than those before it.
        """
        if self._unlike is not None:
            raise DataError(self._unlike)
        return self._shape

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> Tensor:
        return self._pixels(self._column[row], row)

    @abstractmethod
    def _pixels(self, content: bytes, row: int) -> Tensor:
        """The pixels (channels, height, width) that a row's bytes hold."""

    def add_to(self, digest: Digest) -> None:
        """Hash the pixels of all images."""
        if self._unlike is None:
            digest.update(f"{self.dtype} {(len(self), *self._shape)}".encode())
        for row, content in enumerate(self._column):
            pixels = self._pixels(content, row)
            if self._unlike is not None:
                digest.update(f"{self.dtype} {tuple(pixels.shape)}".encode())
            digest.update(pixels.numpy().tobytes())


class ImageFiles(Images):
    """Images as they were found: JPEG, PNG or whatever else Pillow reads; their pixels are uint8 RGB (`pixels`).

    Args:
        column: the files' bytes.
        size: (height, width) of the first image.
        name: of the column, for messages.
        origins: where each row came from, for messages.
    """

    def __init__(
        self, column: Column, size: tuple[int, int], name: str, origins: Sequence[str], unlike: str | None
    ) -> None:
        super().__init__(column, (3, *size), unlike)
        self.dtype = torch.uint8
        self._name, self._origins = name, origins

    def _pixels(self, content: bytes, row: int) -> Tensor:
        """
        Raises:
            DataError: naming the row, if the image is damaged.
        """
        try:
            pixels = decoded(content)
        except (OSError, ValueError) as error:
            raise unreadable(self._origins[row], self._name, error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class PixelArrays(Images):
    """Images that a data set brings as numbers, (n, channels, height, width): float32 in [0, 1], or uint8."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(ArrowColumn(image.numpy().tobytes() for image in images), tuple(images.shape[1:]))
        self.dtype = images.dtype

    def _pixels(self, content: bytes, row: int) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(self._shape)


class Records:
    """n rows that consist of several things: `records[row]` is a mapping, by role; iteration passes over all in order.

    Args:
        column: of each row what `record` makes of it.
        images: those of the rows, if they have any.
    """

    kind: Literal["record"] = "record"

    def __init__(self, column: ArrowColumn, images: Images | None = None) -> None:
        self._column, self.images = column, images

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return _values(self._column[row])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_values, self._column)

    def add_to(self, digest: Digest) -> None:
        """Hash all rows; of an image its file."""
        add_strings(digest, len(self), self._column)


def record(values: Mapping[str, Any]) -> bytes:
    """A row that consists of several things as bytes: what JSON holds, its length before it and the image behind it."""
    content = json.dumps({role: value for role, value in values.items() if role != "image"}).encode()
    image: bytes = values.get("image", b"")
    return len(content).to_bytes(8, "little") + content + image


def _values(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def size_of(content: bytes, where: str, name: str) -> tuple[int, int]:
    """(height, width) of an image file, by its header alone.

    Raises:
        DataError: if it is no image, or one that cannot be read as it is meant.
    """
    try:
        return measured(content)
    except (OSError, ValueError) as error:  # UnidentifiedImageError is an OSError
        raise unreadable(where, name, error) from error


def unreadable(where: str, name: str, error: Exception) -> DataError:
    """What is said of an image that Pillow cannot read."""
    return DataError(f"{where}: column {name!r} holds no readable image: {error}.")


def encoded(text: str) -> bytes:
    """A text as bytes; JSON may hold a lone surrogate, which UTF-8 proper refuses."""
    return text.encode("utf-8", "surrogatepass")


def add_strings(digest: Digest, count: int, strings: Iterable[bytes]) -> None:
    """Hash `count` strings; with their lengths, so that "ab", "c" is not "a", "bc"."""
    digest.update(f"column {count}".encode())
    for content in strings:
        digest.update(len(content).to_bytes(8, "little") + content)
