"""Dual encoders: an image tower and a text tower, whose vectors lie in one space.

    x = P_image f(image),   y = P_text g(text)

A model of one folder (CLIP, SigLIP) brings both towers, its projections and its similarity; all of it is frozen. A
pair, `model.backbone = "<image tower> + <text tower>"`, is any two encoders: x = W f(image), y = g(text), and W,
`head.weight` (d_text, d_image), is trained as heads are (`celora.models.projection` says where it starts).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from celora.core.adapters import linear
from celora.core.learner import Batch
from celora.core.task import HeadOf
from celora.errors import ModelError
from celora.models.backbone import Backbone, Replay, computed
from celora.models.feature_maps import as_tokens
from celora.models.inputs import Inputs, TokenisedTexts, inputs_of
from celora.models.row_reader import NO_IMAGES
from celora.models.slots import Update
from celora.models.sources import ListedTexts
from celora.models.tokens import TextTokenizer, TokenRows
from celora.tensors import Tensors

Tower = Literal["image", "text"]
TOWERS: Sequence[Tower] = ("image", "text")
PREFIXES: Mapping[Tower, str] = {"image": "vision_model.", "text": "text_model."}
"""Where transformers' dual encoders have their towers."""


class CaptionedImages(Inputs):
    """Images, and with each of them one of some texts.

    Args:
        of: of each row the position of its text.
    """

    kind = "image"

    def __init__(self, images: Inputs, texts: Inputs, of: Sequence[int]) -> None:
        self.images, self.texts, self._of = images, texts, of
        self.shape, self.notices = images.shape, (*images.notices, *texts.notices)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: Sequence[int]) -> list[Any]:
        """Pixels (channels, height, width) of each row."""
        return self.images.fetch(rows)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens in the text of each row."""
        return self.texts.lengths(self.chosen(rows))

    def chosen(self, rows: Sequence[int]) -> list[int]:
        """Positions of these rows' texts."""
        return [self._of[row] for row in rows]


class DualBackbone:
    """Two towers, as `AdaptedBackbone` and `SharedBackbone` use a `Backbone`, whose attributes it has.

    Args:
        towers: the two, each adapted or not.
        module: what both are parts of.
        learned: factor and offset that make logits of cosines; None where the model has none.
        projection: from images into the space of texts, of a pair; trained as a head.
        start: what tells where the projection starts.
        filled: whether all texts have one length, filled up and without a mask.
        notices: what the user should know.
    """

    longest, head, prefix = None, None, ""
    saved: tuple[str, ...] = ()

    def __init__(
        self,
        towers: Mapping[Tower, Backbone],
        *,
        module: Any,
        name: str,
        source: str,
        learned: tuple[float, float] | None,
        projection: Tensor | None,
        start: str = "",
        filled: bool = False,
        notices: Sequence[str] = (),
    ) -> None:
        self.tower = towers["image"]
        self.image, self.text, self.name, self.source = towers["image"], towers["text"], name, source
        self.module, self.learned, self.filled, self.notices = module, learned, filled, notices
        self._start = start
        self.own_head: Tensors = {} if projection is None else {"head.weight": projection}
        self.joined = projection is not None
        both = [(PREFIXES[of], tower) for of, tower in towers.items()]
        self.targets = {f"{at}{module}": shape for at, one in both for module, shape in one.targets.items()}
        self.scalings = {f"{at}{module}": s for at, one in both for module, s in one.scalings.items()}
        self.convolutions = frozenset(f"{at}{module}" for at, one in both for module in one.convolutions)
        self.fan_in_fan_out = any(one.fan_in_fan_out for one in towers.values())
        self.depth = self.image.depth
        self.device, self.dropout = self.image.device, self.image.dropout
        self.rows_first = all(one.rows_first for one in towers.values())
        self.pooling, self.dtype = self.text.pooling, self.text.dtype
        self.tokenizer, self.image_shape = self.text.tokenizer, self.image.image_shape
        with torch.no_grad():
            self.width = self.encoded("image", self.image.batch(self.image.sample(), [0]), {}).shape[1]

    def _of(self, module: str) -> tuple[Backbone, str]:
        at, _, name = module.partition(".")
        return (self.image if f"{at}." == PREFIXES["image"] else self.text), name

    def _split(self, updates: Mapping[str, Update], tower: Tower) -> dict[str, Update]:
        at = PREFIXES[tower]
        return {module.removeprefix(at): update for module, update in updates.items() if module.startswith(at)}

    @cached_property
    def capacity(self) -> int:
        """Tokens in one pass, of the tower that takes fewer."""
        return min(self.image.capacity, self.text.capacity)

    def fingerprint(self) -> str:
        """That of the folder which holds both towers and what stands beside them; of a pair, of both together and
        of where the projection starts.
        """
        towers = self.image.fingerprint(), self.text.fingerprint()
        return hashlib.sha256(" ".join([*towers, self._start]).encode()).hexdigest() if self.joined else towers[0]

    def weight(self, module: str) -> Tensor:
        """As `Backbone.weight`."""
        tower, name = self._of(module)
        return tower.weight(name)

    def class_of(self, head_of: HeadOf | None) -> None:
        """None, as no class of transformers puts a linear head on two towers."""
        return

    def read(self, rows: Any, budget: int) -> Inputs:
        """A column of images without texts, as `Backbone.read`."""
        return self.image.read(rows, budget)

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int], budget: int) -> Inputs:
        """As `celora.core.reading.Reader`."""
        return CaptionedImages(
            self.image.read(images, budget), TokenisedTexts(self.text.tokenize, ListedTexts(texts), budget), of
        )

    def words(self, rows: Any, budget: int) -> Inputs:
        """
        Raises:
            ModelError: always, as a text becomes one vector.
        """
        raise ModelError(f"{self.name} makes one vector of a row, so it keeps no words apart")

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """That of the text tower."""
        return self.text.text_tokenizer

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """As `Backbone.tokenize`, of the text tower."""
        return self.text.tokenize(texts)

    def text_batch(self, texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids of texts as the tensors of a batch."""
        return self.text.text_batch(texts)

    def batch(self, rows: Any, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Pixels of some of the rows, and the ids of their texts where they have some, on the CPU."""
        if not isinstance(rows, CaptionedImages):
            return self.image.batch(rows, chosen)
        return {**self.image.batch(rows.images, chosen), **self.text.batch(rows.texts, rows.chosen(chosen))}

    def sample(self) -> CaptionedImages:
        """A few unlike rows, to try the backbone on."""
        images = inputs_of(self.image.sample())
        return CaptionedImages(images, inputs_of(self.text.sample()), range(len(images)))

    def trial(self) -> dict[str, Tensor]:
        """A few images with texts that nobody owns, to try an export on, on the CPU."""
        sample = self.sample()
        return self.batch(sample, range(len(sample)))

    def put_out(self, model: Any, batch: Batch) -> Tensor:
        """Vectors of both towers side by side, as `states`, of a model of transformers or of PEFT's for a batch."""
        image = self.image.accepted(_of_tower(batch, "image"))
        text = self.text.accepted(_of_tower(batch, "text"))
        if not self.joined:
            found = (model.get_image_features(**image).pooler_output, model.get_text_features(**text).pooler_output)
            return torch.cat([vectors.float() for vectors in found], dim=1)
        towers = model.get_base_model()
        seen, read = towers["vision_model"](**image), towers["text_model"](**text)
        pooled = (
            self.image.pool(as_tokens(seen.last_hidden_state.float()), None),
            self.text.pool(read.last_hidden_state.float(), text["attention_mask"]),
        )
        return torch.cat(pooled, dim=1)

    def lengths(self, inputs: Any, rows: Sequence[int]) -> list[int]:
        """Tokens of these rows: an image's, and its text's."""
        images = self.image.lengths(inputs, rows)
        if not isinstance(inputs, CaptionedImages):
            return images
        return [one + two for one, two in zip(images, inputs.lengths(rows), strict=True)]

    def length(self, batch: Batch) -> int:
        """Tokens of the longest row."""
        return self.image.image_tokens + (self.text.length(batch) if "input_ids" in batch else 0)

    def encoded(
        self,
        tower: Tower,
        batch: Batch,
        updates: Mapping[str, Update],
        seed: int | None = None,
        replay: Replay = computed,
    ) -> Tensor:
        """Vectors (rows, d) of one tower, float32; of a pair's image tower before its projection.

        Args:
            replay: of the image tower, as `Backbone.represented`.

        Raises:
            ModelError: if the rows have nothing that it reads.
        """
        own = _of_tower(batch, tower)
        if not own.keys() & {"pixel_values", "input_ids"}:
            raise ModelError(f"the rows have no {tower}s, which {self.name} is to read: hand in images with texts")
        mine = self._split(updates, tower)
        if tower == "text":
            return self.text.encode(own, mine, seed)
        with replay(own):
            return self.image.encode(own, mine, seed)

    def states(
        self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None
    ) -> tuple[Tensor, None]:
        """Vectors of both towers side by side (rows, d_image + d_text), and no mask."""
        return torch.cat([self.encoded(tower, inputs, updates, dropout_seed) for tower in PREFIXES], dim=1), None

    def represented(
        self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None, replay: Replay = computed
    ) -> "_Represented":
        """What becomes of a batch, for a task; a tower runs when it is asked for."""
        return _Represented(self, inputs, updates, dropout_seed, replay)

    def own_updates(self, weights: Tensors) -> dict[str, Update]:
        """None, as the projection stands behind the towers."""
        return {}

    def seen(self, rows: Any, write: Any, budget: int) -> TokenRows:
        """
        Raises:
            ModelError: always, as this is no language model.
        """
        raise ModelError(NO_IMAGES.format(self.name))

    def answers(
        self, prompts: Sequence[Sequence[int]], updates: Mapping[str, Update], most: int, batch: Batch | None = None
    ) -> list[str]:
        """
        Raises:
            ModelError: always.
        """
        raise ModelError(f"{self.name} is no language model, so it answers nothing")

    def squares(self, inputs: Batch) -> dict[str, Tensor]:
        """As `Backbone.squares`."""
        towers: Mapping[Tower, Backbone] = {"image": self.image, "text": self.text}
        found = {tower: one.squares(_of_tower(inputs, tower)) for tower, one in towers.items() if one.targets}
        return {f"{PREFIXES[tower]}{module}": x for tower, of in found.items() for module, x in of.items()}


def _of_tower(batch: Batch, tower: Tower) -> Batch:
    """What a tower reads of a batch."""
    text = ("input_ids", "attention_mask")
    return {name: batch[name] for name in (text if tower == "text" else ("pixel_values", "row")) if name in batch}


@dataclass(frozen=True)
class _Represented:
    """As `celora.core.task.Representation`."""

    backbone: DualBackbone
    batch: Batch
    updates: Mapping[str, Update]
    seed: int | None
    replay: Replay

    @property
    def features(self) -> Tensor:
        return self.backbone.encoded("image", self.batch, self.updates, self.seed, self.replay)

    @property
    def states(self) -> Tensor:
        raise ModelError(f"{self.backbone.name} makes one vector of a row, so it keeps no tokens apart")

    def token_losses(self, labels: Tensor) -> Tensor:
        raise ModelError(f"{self.backbone.name} is no language model, so it predicts no tokens")

    def embedded(self, content: Tower, weights: Tensors) -> Tensor:
        vectors = self.backbone.encoded(content, self.batch, self.updates, self.seed, self.replay)
        if content == "image" and self.backbone.own_head:
            return linear(vectors, weights["head.weight"])
        return vectors

    @property
    def similarity(self) -> tuple[float, float] | None:
        return self.backbone.learned
