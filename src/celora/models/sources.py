"""Rows as a source, or a user of a trained model, hands them in: texts, pairs of texts, or images."""

from typing import Any, Literal, Protocol

from torch import Tensor

from celora.errors import ModelError


class Texts(Protocol):
    """Texts as a source holds them."""

    kind: Literal["text"]

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, row: int, /) -> str | tuple[str, str] | list[str]:
        """One of them, one pair, or the words of one."""


class Images(Protocol):
    """Images as a source holds them."""

    kind: Literal["image"]

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, row: int, /) -> Tensor:
        """One of them: (channels, height, width), uint8 or float32 in [0, 1]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of each of them; an error where they differ."""


class ListedTexts(list[str]):
    """Texts in a list."""

    kind: Literal["text"] = "text"


class TextPairs:
    """Two texts a row: of records with a `text` and a `pair`, or of pairs as they are."""

    kind: Literal["text"] = "text"

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[str, str]:
        match self._rows[row]:
            case {"text": str(text), "pair": str(pair)} | [str(text), str(pair)]:
                return text, pair
            case other:
                raise ModelError(f"found {str(other)[:80]!r} at row {row + 1}; expected a pair of texts, (text, pair)")


class _RecordTexts:
    kind: Literal["text"] = "text"

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> str:
        text: str = self._rows[row]["text"]
        return text


class _StackedImages:
    kind: Literal["image"] = "image"

    def __init__(self, images: Tensor) -> None:
        self._images, self.shape = images, tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Tensor:
        return self._images[row]


def source_of(rows: Any) -> Texts | Images:
    """Rows of a source; lists of texts or pairs, and a tensor (n, channels, height, width), are taken as one;
    of records their images, their pairs or their texts.
    """
    if isinstance(rows, Tensor):
        return _StackedImages(rows)
    if isinstance(rows, list | tuple):
        return ListedTexts(rows) if not rows or isinstance(rows[0], str) else TextPairs(rows)
    source: Texts | Images = rows
    if rows.kind == "record":
        roles = rows[0].keys()
        if rows.images is not None:
            source = rows.images
        elif "pair" in roles:
            source = TextPairs(rows)
        elif "text" in roles:
            source = _RecordTexts(rows)
    return source
