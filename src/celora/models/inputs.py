"""Rows as a model reads them: token ids and pixels, made when they are first needed.

TokenisedTexts, DecodedImages    all rows of a table, in memory within a budget
ReadyInputs                      rows that are in memory anyway
collate                          rows -> the tensors of a batch
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celora.errors import ModelError
from celora.models.sources import Images, Texts

Row = NDArray[Any]
"""Token ids (t,); ids and their types (2, t); or pixels (channels, height, width)."""
Tokenize = Callable[[Sequence[Any]], Sequence[Any]]
"""Texts, or pairs of texts -> the token ids (t,) of each; of pairs with their types (2, t), where a model has types."""

_TEXTS = 1024
"""Texts that are tokenised in one call: enough for a tokenizer's threads, and its own notes on them stay small."""
_OVERHEAD = 256
"""Bytes that a row in memory takes beside its numbers, about."""


class Inputs(ABC):
    """n rows for a model.

    Attributes:
        kind: what they are.
        shape: (channels, height, width) of an image; () of a text.
        notices: what the user should know of how they are made.
        second: what stands beside the token ids, where a row has two lines.
    """

    kind: Literal["text", "image"]
    shape: tuple[int, ...] = ()
    notices: tuple[str, ...] = ()
    second: str = "token_type_ids"

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def fetch(self, rows: Sequence[int]) -> list[Row]:
        """Token ids (t,) or pixels (channels, height, width) of these rows."""

    @abstractmethod
    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens in each of these rows; 1 for an image."""


class TokenisedTexts(Inputs):
    """Texts, tokenised when their ids or their lengths are first asked for.

    Lengths are kept for ever; ids while they are among those used last.

    Args:
        tokenize: gives at least one id for each text.
        budget: bytes of ids in memory.
    """

    kind = "text"

    def __init__(self, tokenize: Tokenize, texts: Texts, budget: int) -> None:
        self._tokenize, self._texts = tokenize, texts
        self._lengths = np.zeros(len(texts), dtype=np.int32)  # 0: not known yet
        self._kept = Kept(budget)

    def __len__(self) -> int:
        return len(self._texts)

    def fetch(self, rows: Sequence[int]) -> list[Row]:
        """Token ids (t,) of each row, uint16 or int32."""
        return self._kept.rows(rows, self._made)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens in each of these rows."""
        at = np.asarray(rows, dtype=np.int64)
        for some in parts(at[self._lengths[at] == 0].tolist()):
            self.fetch(some)
        lengths: list[int] = self._lengths[at].tolist()
        return lengths

    def _made(self, rows: Sequence[int]) -> Iterator[Row]:
        for some in parts(rows):
            for row, ids in zip(some, self._tokenize([self._texts[row] for row in some]), strict=True):
                made = np.array(ids, dtype=np.int32)
                self._lengths[row] = made.shape[-1]
                yield made.astype(np.uint16) if made.max() < 1 << 16 else made


class DecodedImages(Inputs):
    """Images, decoded and prepared when they are first asked for.

    Args:
        prepare: what the model makes of an image; None: its pixels are taken as they are.
        budget: bytes of pixels in memory.

    Raises:
        DataError: if they differ in size and nothing makes them alike.
    """

    kind = "image"

    def __init__(
        self, images: Images, prepare: Callable[[Tensor], Row] | None, budget: int, notices: tuple[str, ...] = ()
    ) -> None:
        self._images, self._prepare, self.notices = images, prepare, notices
        self._kept = Kept(budget)
        self.shape = images.shape if prepare is None else prepare(images[0]).shape

    def __len__(self) -> int:
        return len(self._images)

    def fetch(self, rows: Sequence[int]) -> list[Row]:
        """Pixels (channels, height, width) of each row."""
        return self._kept.rows(rows, self._made)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """1 for each row."""
        return [1] * len(rows)

    def _made(self, rows: Sequence[int]) -> Iterator[Row]:
        for row in rows:
            pixels = self._images[row]
            made = pixels.numpy() if self._prepare is None else self._prepare(pixels)
            if made.shape != self.shape:
                raise ModelError(
                    f"the model's image processor makes {made.shape} of image {row + 1}, and {self.shape} of the "
                    "first; expected one shape: resize the images alike"
                )
            yield made


class ReadyInputs(Inputs):
    """Rows that are in memory as a model reads them: the token ids of each text, or images (n, c, h, w)."""

    def __init__(self, rows: Sequence[Sequence[int]] | Tensor) -> None:
        self._rows = rows
        self.kind = "image" if isinstance(rows, Tensor) else "text"
        self.shape = tuple(rows.shape[1:]) if isinstance(rows, Tensor) else ()

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, rows: Sequence[int]) -> list[Row]:
        """The rows themselves."""
        return [np.asarray(self._rows[row]) for row in rows]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens in each of these rows; 1 for an image."""
        return [1 if self.kind == "image" else len(self._rows[row]) for row in rows]


class Kept:
    """Rows by number, those used last, within a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self._budget, self._held = budget, 0
        self._rows: OrderedDict[int, Row] = OrderedDict()

    def rows(self, numbers: Sequence[int], make: Callable[[Sequence[int]], Iterable[Row]]) -> list[Row]:
        """The rows of these numbers, made where they are not in memory."""
        found: dict[int, Row] = {}
        for number in numbers:
            if number in self._rows:
                self._rows.move_to_end(number)
                found[number] = self._rows[number]
        absent = [number for number in dict.fromkeys(numbers) if number not in found]
        for number, row in zip(absent, make(absent), strict=True):
            found[number] = row
            self._keep(number, row)
        return [found[number] for number in numbers]

    def _keep(self, number: int, row: Row) -> None:
        self._rows[number] = row
        self._held += row.nbytes + _OVERHEAD
        while self._held > self._budget:
            _, oldest = self._rows.popitem(last=False)
            self._held -= oldest.nbytes + _OVERHEAD


def inputs_of(rows: Inputs | Sequence[Sequence[int]] | Tensor) -> Inputs:
    """Rows for a model; lists of token ids and tensors of images are taken as they are."""
    return rows if isinstance(rows, Inputs) else ReadyInputs(rows)


def collate(rows: Sequence[Row], padding: int, second: str = "token_type_ids") -> dict[str, Tensor]:
    """Rows as the tensors of a batch, on the CPU; texts are padded to the longest, and uint8 pixels are over 255.

    Args:
        second: what stands beside the ids where rows have two lines.

    Returns:
        `pixel_values (b, channels, h, w)`, or `input_ids (b, t)` and `attention_mask (b, t)`, and `second (b, t)`.
    """
    if rows[0].ndim > 2:
        pixels = torch.from_numpy(np.stack(rows))
        return {"pixel_values": pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels}
    lengths = np.array([row.shape[-1] for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids, types = np.full(mask.shape, padding), np.zeros(mask.shape, dtype=np.int64)
    whole = np.concatenate(rows, axis=-1)
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    if whole.ndim == 1:
        ids[mask] = whole
        return batch
    ids[mask], types[mask] = whole
    return {**batch, second: torch.from_numpy(types)}


def parts(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """The rows, as many at a time as are made in one call."""
    return (rows[start : start + _TEXTS] for start in range(0, len(rows), _TEXTS))
