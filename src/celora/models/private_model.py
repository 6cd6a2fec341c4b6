"""A client's own whole network, nothing of it frozen, and the adapter beside its head.

    z = body_k(x),   y_local = FC z,   y = y_local + s·B A z           A (r, d), B (outputs, r)

FC is the task's linear head. Weights of the body are named `own.<parameter>`, those of the adapter `fc.A` and `fc.B`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from celora.core.adapters import Family, modules
from celora.core.learner import Batch
from celora.core.task import Task
from celora.errors import ModelError
from celora.models import loading, placement, targets
from celora.models.inputs import DecodedImages, Inputs, TokenisedTexts, collate, inputs_of
from celora.models.settings import Model
from celora.models.sources import source_of
from celora.rng import generator
from celora.tensors import Tensors

FC = "fc"
PREFIX = "own."
CNNS: Mapping[str, tuple[int, int, int]] = {
    "cnn-1": (16, 32, 2000),
    "cnn-2": (16, 16, 2000),
    "cnn-3": (16, 32, 1000),
    "cnn-4": (16, 32, 800),
    "cnn-5": (16, 32, 500),
}
"""The five networks of pFedLoRA's experiments: filters of the first and the second layer, units of the third."""
WIDTH = 500
"""Their last hidden layer."""
_ROWS = 256
"""Rows in a pass that trains nothing."""
NO_LANGUAGE = "a client's own network is no language model, so it predicts no tokens: set model.backbone to one"
NO_PAIRS = "a client's own network reads images or texts, not both: set model.backbone to a dual encoder"
NO_TOKENS = "a client's own network keeps no tokens apart: set model.backbone to one that does"
_READ = ("input_ids", "attention_mask", "pixel_values")


class Cnn(nn.Module):
    """Two 5 × 5 convolutions, each halved by max-pooling, and two linear layers: (b, 3, 32, 32) -> (b, 500)."""

    def __init__(self, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, first, 5), nn.Conv2d(first, second, 5)
        self.fc1, self.fc2 = nn.Linear(second * 25, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of images of 32 × 32 pixels."""
        x = F.max_pool2d(self.conv1(pixel_values).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        z: Tensor = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return z


class Encoder(nn.Module):
    """The lowest layers of a text encoder, mean-pooled: token ids (b, t) -> (b, d)."""

    def __init__(self, transformer: nn.Module, layers: int, name: str) -> None:
        super().__init__()
        stacks = targets.layers(transformer)
        if not 1 <= layers <= len(stacks):
            raise ModelError(f"model.own: found {name!r} with {layers} layers, expected 1 to {len(stacks)}")
        where, _, _ = next(iter(stacks)).rpartition(".")
        parent, _, leaf = where.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, nn.ModuleList(list(stacks.values())[:layers]))
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last hidden states; padding takes no part."""
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
        pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return pooled


class PrivateModel:
    """One architecture, loaded once.

    Args:
        name: "cnn-1" … "cnn-5", or `<backbone>:<layers>` for the lowest layers of a text encoder.

    Attributes:
        kind: "text" or "image"; width: length d of z; start: `own.<parameter>` -> where everybody who has it starts.
    """

    def __init__(self, name: str, model: Model, base: Path, seed: int) -> None:
        self.name, self.tokenizer, self.max_length = name, None, model.max_length
        backbone, _, layers = name.partition(":")
        self.body: nn.Module
        if name in CNNS:
            self.kind, self.width, self.body = "image", WIDTH, Cnn(*CNNS[name])
            for path, weight in self.body.state_dict().items():  # as torch draws them, but each by its name
                fan_in = self.body.state_dict()[path.replace("bias", "weight")][0].numel()
                uniform = torch.rand(weight.shape, generator=generator(seed, "own", name, path))
                weight.copy_((2 * uniform - 1) / math.sqrt(fan_in))
        elif layers.isdecimal():
            found = loading.fetch(replace(model, backbone=backbone, own=None, dtype="float32"), base)
            transformer, self.tokenizer = found.transformer, found.tokenizer
            if self.tokenizer is None:
                raise ModelError(f"model.own: found {name!r}, which reads images; only text encoders can be cut")
            self.kind, self.width = "text", int(transformer.config.hidden_size)  # type: ignore[union-attr,arg-type]
            self.body = Encoder(transformer, int(layers), name)
        else:
            raise ModelError(f"model.own: found {name!r}, expected {', '.join(CNNS)}, or such as minilm:4")
        self.device = placement.device_of(model.device)
        self.body = self.body.requires_grad_(False).eval().to(self.device)
        self.start = {f"{PREFIX}{path}": weight.detach().cpu() for path, weight in self.body.named_parameters()}

    def read(self, rows: Any, budget: int) -> Inputs:
        """Rows as this architecture reads them, made when they are first needed; pixels are taken as they are.

        Args:
            rows: as `Backbone.read`.
            budget: bytes of token ids or pixels in memory.

        Raises:
            ModelError: if it reads another kind.
            DataError: if images differ in size.
        """
        source = source_of(rows)
        if source.kind != self.kind:
            raise ModelError(f"model.own = {self.name} reads {self.kind}s; found {source.kind}s")
        if source.kind == "text":
            return TokenisedTexts(self._tokenize, source, budget)
        inputs = DecodedImages(source, None, budget)
        if inputs.shape != (3, 32, 32):
            raise ModelError(f"{self.name} reads images of shape (3, 32, 32); found {inputs.shape}")
        return inputs

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer: Any = self.tokenizer
        found: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [ids or [0] for ids in found]


@dataclass(frozen=True)
class _Representation:
    """As `celora.core.task.Representation`."""

    features: Tensor

    @property
    def states(self) -> Tensor:
        raise ModelError(NO_TOKENS)

    def token_losses(self, labels: Tensor) -> Tensor:
        raise ModelError(NO_LANGUAGE)

    def embedded(self, content: Literal["image", "text"], weights: Tensors) -> Tensor:
        raise ModelError(NO_PAIRS)

    @property
    def similarity(self) -> None:
        return None


class PrivateNetwork:
    """An architecture with the weights of whoever has it (a `Network`), and the adapter beside its head.

    Args:
        family: of the adapter; scaling: s.
    """

    joins = dropout = False
    own_head: Tensors = {}  # noqa: RUF012  # there is none

    def __init__(self, model: PrivateModel, family: Family, scaling: float) -> None:
        self._model, self._family, self._scaling = model, family, scaling
        self.width, self.device = model.width, model.device
        self.capacity = _ROWS * (model.max_length if model.kind == "text" else 1)

    def lengths(self, inputs: Any, rows: Sequence[int]) -> list[int]:
        """Tokens of these rows; 1 for an image."""
        return inputs_of(inputs).lengths(rows)

    def length(self, batch: Batch) -> int:
        """Tokens of the longest row; 1 for an image."""
        return batch["input_ids"].shape[1] if "input_ids" in batch else 1

    def pieces(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """All rows, in their order."""
        for start in range(0, len(lengths), _ROWS):
            yield list(range(start, min(start + _ROWS, len(lengths))))

    def batch(self, inputs: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """These rows as tensors on the CPU; texts are padded to the longest of them."""
        return collate(inputs_of(inputs).fetch(rows), 0)

    def features(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """z (rows, d) under a client's own weights; a weight that is missing is as it was at the start."""
        own = {path.removeprefix(PREFIX): w for path, w in weights.items() if path.startswith(PREFIX)}
        accepted = {name: batch[name].to(self.device) for name in _READ if name in batch}
        z: Tensor = functional_call(self._model.body, own, kwargs=accepted)
        return z

    def outputs(self, task: Task, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """y (rows, outputs)."""
        z = self.features(weights, batch)
        return task.outputs(_Representation(z), weights, batch) + self._scaling * self._family.delta(
            z, modules(weights)[FC]
        )

    def candidates(self, task: Task, weights: Tensors) -> dict[str, Tensor]:
        """None."""
        return {}

    def answers(
        self, weights: Tensors, prompts: Sequence[Sequence[int]], most: int, batch: Batch | None = None
    ) -> list[str]:
        """
        Raises:
            ModelError: always, as no network of a client's own is a language model.
        """
        raise ModelError(NO_LANGUAGE)

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """As `answers`."""
        raise ModelError(NO_LANGUAGE)

    def squares(self, batch: Batch) -> Mapping[str, Tensor]:
        """Σ z² (d,), as z is what the adapter reads."""
        return {FC: self.features({}, batch).double().square().sum(0).cpu()}
