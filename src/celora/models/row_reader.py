"""How a backbone reads rows: texts by its tokenizer, images by its own processor; nothing here runs the transformer."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from celora.errors import ModelError
from celora.models.image_processor import FILE as PROCESSOR
from celora.models.image_processor import ImageProcessor, image_processor
from celora.models.inputs import DecodedImages, Inputs, TokenisedTexts, collate, inputs_of
from celora.models.settings import Model
from celora.models.sources import TextPairs, source_of
from celora.models.tokens import TextTokenizer, TokenRows
from celora.models.words import TokenisedWords

_SQUARE = 256
"""Pixels of a side of an image of no particular size, to see what a processor makes of it."""
_SAMPLE = (
    "The first of a few texts.",
    "Another one, of about its length",
    "And one more that is a good deal longer than they are: it goes on, and on, until it has more than 16 tokens.",
    "The last?",
)

NO_DUAL = (
    "{} is no dual encoder; expected a model such as CLIP or SigLIP, or an image and a text tower, such as "
    '"efficientnet-lite0 + minilm"'
)

NO_IMAGES = (
    "{} reads no images among its tokens; expected a model such as LLaVA or Qwen-VL, or an image encoder and a "
    'language model, such as "efficientnet-lite0 + smollm2"'
)


class RowReader:
    """What makes rows of a source into batches.

    Attributes:
        notices: what the user should know.

    Args:
        kind: what the backbone reads.
        tokenizer: None for images.
        source: the folder or the Hub id that the backbone was loaded from.
        config: the transformer's.
        typed: whether the transformer takes the types of tokens (of pairs).
    """

    def __init__(
        self,
        kind: Literal["text", "image"],
        tokenizer: Any,
        source: str,
        *,
        model: Model,
        config: Any,
        typed: bool,
    ) -> None:
        self.notices: Sequence[str] = ()
        self.kind, self.tokenizer, self.name, self.source = kind, tokenizer, model.backbone, source
        self._model, self._config, self._typed = model, config, typed

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """What makes rows of a language model.

        Raises:
            ModelError: if this backbone reads images.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self._model.backbone} reads images and has no tokenizer; found texts")
        return TextTokenizer(self.tokenizer, self._model.max_length)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `max_length`; at least one token each.

        Raises:
            ModelError: if this backbone reads images.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self._model.backbone} reads images and has no tokenizer; found texts")
        if not texts:
            return []
        found = self.tokenizer(list(texts), truncation=True, max_length=self._model.max_length)["input_ids"]
        return [list(ids) or [self.padding] for ids in found]

    def tokenize_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Token ids (t,) of each pair as the tokenizer joins two texts, the longer cut first; (2, t) with their types,
        where tokenizer and transformer both have types.
        """
        texts, others = map(list, zip(*pairs, strict=True))
        found = self.tokenizer(texts, others, truncation="longest_first", max_length=self._model.max_length)
        ids = [row or [self.padding] for row in found["input_ids"]]
        if not self.types:
            return ids
        return [[row, types or [0]] for row, types in zip(ids, found["token_type_ids"], strict=True)]

    @property
    def types(self) -> bool:
        """Whether pairs have types of tokens: tokenizer and transformer both know them."""
        return self._typed and "token_type_ids" in self.tokenizer.model_input_names

    @cached_property
    def padding(self) -> int:
        """A token to pad with: one that ends no text, as decoders' own classifiers take the last token that is none.

        Otherwise it does not matter which, for padding is masked.
        """
        known = self.tokenizer
        candidates = (known.pad_token_id, known.eos_token_id, known.bos_token_id, known.unk_token_id)
        given = [token for token in candidates if token is not None]
        return next((token for token in given if token not in known("a")["input_ids"][-1:]), 0)

    @cached_property
    def processor(self) -> ImageProcessor | None:
        """The backbone's own image processor; None for texts, and where it brings none."""
        if self.kind == "text":
            return None
        return image_processor(self.source, self._config.num_channels, self._model.image_size)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images an image backbone reads: what its own processor makes of them.

        Raises:
            ModelError: if neither a processor nor the configuration says it: ResNets, which read any size, say none.
        """
        side = self._config.to_dict().get("image_size")
        if side is None and self.processor is None:
            raise ModelError(
                f"{self.name} brings no image processor ({PROCESSOR}) and its config.json no image_size, so the "
                "size of its images is unknown: save its processor beside it, or set image_size in config.json"
            )
        height, width = (side, side) if isinstance(side, int) else side or (_SQUARE, _SQUARE)
        shape = self._config.num_channels, height, width
        return shape if self.processor is None else self.processor.shape_of(shape)

    def read(self, rows: Any, budget: int) -> Inputs:
        """The rows of a source as this backbone reads them, made when they are first needed.

        Args:
            rows: n texts, pairs or images: `Texts`, `Images`, `Records` with a `text` and a `pair`, a list of texts or
                of pairs (text, pair), or a tensor (n, channels, height, width).
            budget: bytes of token ids or pixels in memory.

        Raises:
            ModelError: if this backbone cannot read them, naming what was found and what is expected.
            DataError: if images differ in size and the backbone brings no processor that makes them alike.
        """
        source = source_of(rows)
        if source.kind != self.kind:
            raise ModelError(f"{self.name} reads {self.kind}s; found {source.kind}s: choose another model.backbone")
        if source.kind == "text":
            tokenize = self.tokenize_pairs if isinstance(source, TextPairs) else self.tokenize
            return TokenisedTexts(tokenize, source, budget)
        plain = self.processor is None and source[0].dtype == torch.uint8
        notice = f"pixels are divided by 255: {self.name} brings no image processor ({PROCESSOR})"
        inputs = DecodedImages(source, self.processor, budget, (notice,) if plain else ())
        if inputs.shape != self.image_shape:
            raise ModelError(f"{self.name} reads images of shape {self.image_shape}; found {inputs.shape}: resize them")
        return inputs

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int], budget: int) -> Inputs:
        """
        Raises:
            ModelError: always, as this is no dual encoder.
        """
        raise ModelError(NO_DUAL.format(self.name))

    def seen(self, rows: Any, write: Any, budget: int) -> TokenRows:
        """
        Raises:
            ModelError: always, as this is no model of images and texts.
        """
        raise ModelError(NO_IMAGES.format(self.name))

    def text_batch(self, texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids of texts as the tensors of a batch."""
        return self.batch(texts, range(len(texts)))

    def words(self, rows: Any, budget: int) -> Inputs:
        """As `celora.core.reading.Reader`; arguments as `read`."""
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise ModelError(f"{self.name} has no tokenizer that tells which word a piece is of; found words")
        return TokenisedWords(self.tokenizer, rows, most=self._model.max_length, padding=self.padding, budget=budget)

    def batch(self, rows: Inputs | Sequence[Sequence[int]] | Tensor, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Some of the rows as tensors on the CPU, as `collate` makes them."""
        inputs = inputs_of(rows)
        return collate(inputs.fetch(chosen), self.padding if self.kind == "text" else 0, inputs.second)

    def sample(self) -> list[list[int]] | Tensor:
        """A few unlike rows to try the backbone on; texts have an odd number of tokens."""
        if self.kind == "text":
            return [row[: (len(row) - 1) | 1] for row in self.tokenize(_SAMPLE)]
        return torch.linspace(0, 1, 2 * math.prod(self.image_shape)).view(2, *self.image_shape)
