"""Rows of an image and texts, as models of images and texts read them: ids with places for the image, and its pixels.

How many places an image takes, and what else a family wants to know of it, is said by the model's own processor
(`Look`). Places and pixels belong together, so such rows are never cut inside the image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celora.core.reading import TokenRow
from celora.errors import DataError, ModelError
from celora.models.inputs import Kept, Row, collate
from celora.models.loading import reason
from celora.models.tokens import TextTokenizer, TokenRows, as_array

ALONG: Mapping[str, int] = {"token_type_ids": 1, "mm_token_type_ids": 0}
"""What a processor says of each token -> what it is of the tokens of an answer."""


class Picture(dict[str, NDArray[Any]]):
    """What becomes of an image and the text it stands in: `input_ids` (t,), `pixel_values`, and what else there is."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(array.nbytes for array in self.values())


Look = Callable[[Tensor, str], Picture]
"""An image (c, h, w) uint8, and the text that it stands in or before; a ValueError if it has more places."""
Write = Callable[[Any, Callable[[str], Sequence[int]]], TokenRow]
"""A row of a source, and what gives the ids of a text with the row's image -> a row of a language model."""


class SeeingTokenizer(TextTokenizer):
    """The tokenizer of a model of images and texts: the text with the image is read by `Look`, which begins the row.

    Args:
        template: what writes messages: the processor, or the tokenizer.
        typed: whether it is told where the image stands, at the beginning of what the user says first; otherwise the
            image begins the row.
    """

    start: list[int] = []  # noqa: RUF012  # `Look` begins a row

    def __init__(self, tokenizer: Any, most: int, template: Any, *, typed: bool) -> None:
        super().__init__(tokenizer, most)
        self._template, self._typed = template, typed

    def dialogue(self, messages: Sequence[Mapping[str, str]], reply: bool) -> str:
        """As `TextTokenizer`."""
        if self._template.chat_template is None:
            raise ModelError("the model has no chat template, so messages cannot be written as it reads them: "
                             'set task.template = "plain" or "alpaca"')  # fmt: skip
        first = next((at for at, one in enumerate(messages) if one["role"] == "user"), 0)
        written: list[dict[str, Any]] = []
        for at, one in enumerate(messages):
            words = {"type": "text", "text": one["content"]}
            content = [{"type": "image"}, words] if at == first else [words]
            written.append({**one, "content": content if self._typed else one["content"]})
        try:
            found: str = self._template.apply_chat_template(written, tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # a template is a program of the model's own, which may raise anything
            raise ModelError(f"the model's chat template refuses messages: {reason(error)}") from error
        bos = self._tokenizer.bos_token
        return found.removeprefix(bos) if bos and self._tokenizer("")["input_ids"][:1] else found


class SeenRows(TokenRows):
    """Rows with an image each, made when they or their lengths are first asked for.

    Args:
        write: makes a row of a language model.
        rows: of the source.
        images: those of the rows.
        budget: bytes of ids and pixels in memory.
    """

    looked_at = 16  # an image may cost a pass through its encoder

    def __init__(self, write: Write, rows: Any, images: Any, look: Look, budget: int) -> None:
        super().__init__(lambda some: [], rows, budget)
        self._write, self._images, self._look, self._pictures = write, images, look, Kept(budget)

    def pictures(self, rows: Sequence[int]) -> list[Any]:
        """The `Picture` of each of these rows."""
        return self._pictures.rows(rows, self._looked)

    def _looked(self, rows: Sequence[int]) -> Iterator[Any]:
        for row in rows:
            seen = list[Picture]()
            self._write(self._rows[row], partial(self._see, row, seen))
            yield seen[0]

    def _made(self, rows: Sequence[int]) -> Iterator[Row]:
        for row in rows:
            seen = list[Picture]()
            made = self._write(self._rows[row], partial(self._see, row, seen))
            self._pictures.rows([row], lambda _, seen=seen: seen)  # type: ignore[misc]  # kept, if it was not yet
            self._lengths[row], self._bytes[row], self._cut[row] = len(made.ids), made.size, made.cut
            yield as_array(made)

    def _see(self, row: int, seen: list[Picture], text: str) -> Sequence[int]:
        try:
            seen.append(self._look(self._images[row], text))
        except ValueError as error:
            raise DataError(f"row {row + 1}: its image and text cannot be read: {reason(error)}") from error
        ids: list[int] = seen[0]["input_ids"].tolist()
        return ids


def images_of(rows: Any, name: str) -> Any:
    """The images of rows.

    Args:
        name: of the model.

    Raises:
        ModelError: if they are neither records with images nor a list of mappings with an image and texts each.
    """
    expected = '{"image": a tensor (channels, height, width), "prompt": a text} or with "messages"'
    match rows:
        case list():
            images = list[Tensor]()
            for at, row in enumerate(rows):
                match row:
                    case {"image": Tensor(ndim=3) as image} if isinstance(row.get("prompt", ""), str):
                        images.append(image)
                    case other:
                        raise ModelError(
                            f"{name} reads images with texts; found {str(other)[:80]!r} at row {at + 1}; expected "
                            f"{expected}"
                        )
            return images
        case object(images=images) if images is not None:
            return images
        case other:
            raise ModelError(
                f"{name} reads images with texts; found a {type(other).__name__}; expected a list of {expected}"
            )


def seen_batch(rows: SeenRows, chosen: Sequence[int], padding: int) -> dict[str, Tensor]:
    """Some of the rows as the tensors of a batch; what is unlike in shape is filled up with 0."""
    batch, pictures = collate(rows.fetch(chosen), padding), rows.pictures(chosen)
    for name in pictures[0].keys() - {"input_ids"}:
        arrays = [picture[name] for picture in pictures]
        if name in ALONG:
            whole = torch.full(batch["input_ids"].shape, ALONG[name])
            for line, array in zip(whole, arrays, strict=True):
                line[: len(array)] = torch.from_numpy(array)
            batch[name] = whole * batch["attention_mask"]
        else:
            shape = [max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True)]
            filled = np.zeros((len(arrays), *shape), dtype=arrays[0].dtype)
            for line, array in zip(filled, arrays, strict=True):
                line[tuple(slice(size) for size in array.shape)] = array
            batch[name] = torch.from_numpy(filled)
    return batch


def flattened(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as the family reads it: patches of all rows one after another, where there are grids of them."""
    found = dict(batch)
    if "image_grid_thw" in found:
        counts = found["image_grid_thw"].prod(1).tolist()
        found["pixel_values"] = torch.cat([x[:n] for x, n in zip(found["pixel_values"], counts, strict=True)])
    return found
