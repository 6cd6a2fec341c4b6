"""The frozen backbone: loaded once, adapted by stock PEFT, shared by every client of the process."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from celora.core.learner import Batch
from celora.core.task import Architecture, HeadOf, Representation
from celora.errors import ModelError
from celora.models import loading, targets
from celora.models.feature_maps import as_tokens, keep_statistics, numbers_put_out
from celora.models.inputs import inputs_of
from celora.models.language import LanguageHead, answered
from celora.models.row_reader import NO_DUAL, NO_IMAGES, RowReader
from celora.models.settings import Adapter, Model, Pooling
from celora.models.slots import Update, bound, inject, reads_maps, transposed, watched
from celora.models.task_classes import TaskClass, task_class
from celora.models.tokens import TokenRows
from celora.tensors import Tensors

_ACCEPTED = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
_PASS = 1024 * 384
"""Numbers in one hidden state of a pass on a CPU: MiniLM, 384 wide, is fastest at 512 to 1024 tokens."""
_LEAST = 512
"""Tokens in a pass, at least."""


Replay = Callable[[Batch], AbstractContextManager[None]]


def computed(batch: Batch) -> AbstractContextManager[None]:
    """A `Replay` within which all layers are computed."""
    return nullcontext()


class Backbone(RowReader):
    """A frozen transformer whose adapted modules take their LoRA factors per call.

    Args:
        adapted: whether there are any, as a tower of a dual encoder may have none.
        projector: linear modules that are trained whole, as a head of the backbone's own.

    Attributes:
        kind: "text" or "image".
        width: length d of a pooled feature vector.
        targets: adapted module -> (d_out, d_in).
        device: where it runs.
        scalings: adapted module -> s, the factor of ΔW.
        fan_in_fan_out: whether the adapted modules store Wᵀ, as GPT-2's do; PEFT wants to know.
        convolutions: those of the adapted modules that are 1 × 1 convolutions.
        positions: of the map that an image becomes; None where it becomes tokens.
        layers: its layers, from the input up.
        depth: frozen layers below the first adapted one, whose work need not be repeated; 0 with dropout.
        longest: tokens that a text may have; None for images.
        rows_first: whether the first axis of what the adapted modules read is that of rows, so that clients can share
            a pass. It is not in XLNet and Longformer, where tokens come first, nor where DeBERTa projects positions.
        dropout: whether the backbone's own dropout is on while training.
        tokenizer: None for images.
        name: as it was asked for; source: the folder or the Hub id it was loaded from.
        head: of a language model; None where hidden states are all that is read.
        prefix: where the transformer lies in the model that it was loaded as, "" or such as "model.".
        tower: the image encoder that reads for this backbone, if it has one of its own.
        own_head: tensors `head.*` that the backbone itself brings, as they start; they are trained as a task's are.
        pooling: how a row's token vectors become one vector: `model.pooling`, or what becomes this backbone.

    Raises:
        ModelError: if it cannot read texts of `max_length`, has no such targets or layers, or gives no vector for each
            token.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: Any,
        source: str,
        *,
        model: Model,
        adapter: Adapter,
        architecture: Architecture = "encoder",
        adapted: bool = True,
        projector: Sequence[str] = (),
    ) -> None:
        whole: Any = transformer
        self.head = LanguageHead(whole) if architecture in ("causal-lm", "image-text") else None
        self.prefix = f"{whole.base_model_prefix}." if self.head and whole.base_model_prefix else ""
        self.own_head: Tensors = {}
        self.tower: Backbone | None = None
        transformer = whole.base_model if self.head else transformer
        kind = loading.kind(transformer)
        self.longest = loading.longest(transformer, tokenizer) if kind == "text" else None
        if self.longest is not None and model.max_length > self.longest:
            found, expected = model.max_length, self.longest
            raise ModelError(f"model.max_length = {found}, but {model.backbone} reads at most {expected}")
        layers = targets.layers(transformer)
        names = list[str]()
        if adapted:
            names = targets.matching(transformer, adapter.targets, model.backbone)
            names = targets.topmost(names, layers, adapter.layers, model.backbone)
            targets.check_patterns(names, adapter, model.backbone)
        self._adapted = inject(transformer, [*names, *projector], adapter)
        self.targets: dict[str, tuple[int, int]] = {
            name: (layer.out_features, layer.in_features)
            for name, layer in self._adapted.items()
            if name not in projector
        }
        self.layers = tuple(layers.values())
        self.depth = 0 if model.dropout or not names else targets.below(names, layers)
        self.scalings = {name: adapter.factor_at(name) for name in self._adapted}
        self.fan_in_fan_out = any(map(transposed, self._adapted.values()))
        self.convolutions = frozenset(name for name, layer in self._adapted.items() if reads_maps(layer))
        self.device = loading.device_of(model.device)
        self.dropout = model.dropout
        decides = architecture == "encoder" and kind == "text" and model.pooling in (None, "last")
        self._sequence = task_class(transformer, "sequence") if decides else None
        self.pooling: Pooling = model.pooling or ("last" if self._sequence else "mean")
        config: Any = transformer.config
        typed = not self._sequence and "token_type_ids" in signature(transformer.forward).parameters
        super().__init__(kind, tokenizer, source, model=model, config=config, typed=typed)  # decoders know no types
        self._whole: nn.Module = whole.requires_grad_(False).eval().to(self.device)
        self._transformer = transformer
        (_, one), (states, two) = self._tried(1), self._tried(2)
        self.positions = math.prod(states.shape[2:]) if states.dim() == 4 else None
        if self.positions and self.pooling != "mean":
            raise ModelError(f'model.pooling = "{self.pooling}", but {self.name} makes a map of an image: use "mean"')
        self.width = as_tokens(states).shape[-1]
        # a call has rows on the first axis of what it reads if that is twice as long for two of them
        calls = {name: zip(one.get(name, [0]), two.get(name, [1]), strict=False) for name in self.targets}
        self._of_rows = {name: [2 * n == m for n, m in lengths] for name, lengths in calls.items()}
        self.rows_first = all(map(all, self._of_rows.values()))
        if self.head:
            with torch.no_grad():
                batch = self._moved(self.batch(self.sample(), [0]))
                self.head.check(self.name, partial(self.states, updates={}), batch)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return next(self._whole.parameters()).dtype

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._whole.state_dict().items():
            head = f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}\n"
            digest.update(head.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and values of the frozen weights, whatever adapts them."""
        return self._digest

    def weight(self, module: str) -> Tensor:
        """The frozen weight of an adapted module, (d_out, d_in) float64 on the CPU."""
        layer = self._adapted[module]
        weight: Tensor = layer.get_base_layer().weight.detach().cpu().double()
        return weight.T if layer.fan_in_fan_out else weight

    def class_of(self, head_of: HeadOf | None) -> TaskClass | None:
        """The class of transformers that an adapter with a head of this kind fits into; None: that of the backbone."""
        if head_of == "token" and self.kind == "text":
            return self._token
        return self._sequence if head_of == "sequence" else None

    @cached_property
    def _token(self) -> TaskClass | None:
        return task_class(self._transformer, "token")

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes: its patches and one for the class, or its positions; 1 for a text backbone."""
        if self.kind == "text":
            return 1
        if self.positions:
            return self.positions
        patch = self._config.to_dict().get("patch_size") or 16
        down, across = (patch, patch) if isinstance(patch, int) else patch
        _, height, width = self.image_shape
        return (height // down) * (width // across) + 1

    @property
    def pads(self) -> bool:
        """Whether it reads off its convolutions how to pad, as transformers' MobileNets do."""
        return bool(self._config.to_dict().get("tf_padding"))

    @cached_property
    def capacity(self) -> int:
        """Tokens in one pass: what is fastest on a CPU; on CUDA what half of the free memory holds.

        Activations take h (34 + 5 a t / h) bytes a token and layer at 2 bytes a number, twice that at 4 (Korthikanti
        et al., MLSys 2023, equation 2; a heads, t tokens a row, here the longest that is read). Those of convolutions
        are counted.
        """
        if self.device.type != "cuda":
            return max(_LEAST, _PASS // self.width)
        free, _ = torch.cuda.mem_get_info(self.device)
        config, width = self._config.get_text_config(), 2 if self._model.dtype == "bfloat16" else 4
        if self.positions:
            with bound(self._adapted, {}):
                numbers = numbers_put_out(self._transformer, self._moved(self.batch(self.sample(), [0])))
            return max(_LEAST, int(free / 2 / (numbers * width) * self.positions))
        longest = self._model.max_length if self.kind == "text" else self.image_tokens
        heads = np.max(config.num_attention_heads)  # Swin has some for each stage
        inner = 34 * config.hidden_size + 5 * heads * longest
        return max(_LEAST, int(free / 2 / (config.num_hidden_layers * inner * width / 2)))

    def encode(self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None) -> Tensor:
        """Pooled features (rows, d), float32; arguments as `states`."""
        return self.pool(*self.states(inputs, updates, dropout_seed))

    def represented(
        self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None, replay: Replay = computed
    ) -> Representation:
        """What becomes of a batch, for a task; other arguments as `states`.

        Args:
            replay: within what it gives for the batch, layers below the first adapted one need not be computed.
        """
        with replay(inputs):
            return _Represented(self, *self.states(inputs, updates, dropout_seed))

    def lengths(self, inputs: Any, rows: Sequence[int]) -> list[int]:
        """Tokens of these rows; images are all alike."""
        return [self.image_tokens] * len(rows) if self.kind == "image" else inputs_of(inputs).lengths(rows)

    def length(self, batch: Batch) -> int:
        """Tokens of the longest row; images are all alike."""
        mask = batch.get("attention_mask")
        return self.image_tokens if mask is None else mask.shape[1]

    def states(
        self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (rows, t, d) of the last layer, float32, and the mask (rows, t) of texts.

        Args:
            inputs: what `batch` made; other keys are ignored.
            updates: module -> what is added to its output, over s; a missing module stays frozen, so `{}` gives the
                features of the backbone itself.
            dropout_seed: given, what drops out draws from this seed: the backbone, where its dropout is on, and
                updates.
        """
        states: Tensor = self._run(inputs, updates, dropout_seed).last_hidden_state
        mask = inputs.get("attention_mask")
        return as_tokens(states.float()), None if mask is None else mask.to(self.device, non_blocking=True)

    def _run(self, inputs: Batch, updates: Mapping[str, Update], dropout_seed: int | None) -> Any:
        """What the transformer puts out."""
        accepted = self._moved(inputs)
        with bound(self._adapted, updates):
            return self._transformer(**accepted) if dropout_seed is None else self._seeded(accepted, dropout_seed)

    def own_updates(self, weights: Tensors) -> dict[str, Update]:
        """What is added to modules that are trained whole; none."""
        return {}

    def seen(self, rows: Any, write: Any, budget: int) -> TokenRows:
        """
        Raises:
            ModelError: always, as this is no model of images and texts.
        """
        raise ModelError(NO_IMAGES.format(self.name))

    def answers(
        self, prompts: Sequence[Sequence[int]], updates: Mapping[str, Update], most: int, batch: Batch | None = None
    ) -> list[str]:
        """What the language model answers to each prompt, greedily, in at most so many tokens.

        A prompt that leaves no room for an answer among the model's positions is cut from the left, behind the token
        that begins a text.

        Args:
            prompts: token ids of each, at least one.
            updates: as `states`; where they are of several clients, prompts are client-major.
            batch: the rows that the prompts begin, for a model that sees.
        """
        assert self.head is not None, "only a language model is asked for answers"
        text, begun = self.text_tokenizer, len(self.text_tokenizer.start)
        room = max(begun + 1, (self.longest or most) - most)
        fitting = [[*ids[:begun], *ids[begun:][begun - room :]] if len(ids) > room else ids for ids in prompts]
        with bound(self._adapted, updates):
            found = answered(
                self._transformer,
                self.head,
                fitting,
                most=most,
                end=self.head.ends(self.tokenizer),
                padding=self.padding,
            )
        return [text.text(ids) for ids in found]

    def _moved(self, inputs: Batch) -> dict[str, Tensor]:
        """What the transformer reads of a batch, on the device; the copy does not wait."""
        accepted = {name: inputs[name] for name in _ACCEPTED if name in inputs}
        if self.device.type != "cuda":
            return {name: tensor.to(self.device) for name, tensor in accepted.items()}
        return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in accepted.items()}

    @torch.no_grad()
    def squares(self, inputs: Batch) -> dict[str, Tensor]:
        """Adapted module -> the sum over all tokens of its squared inputs (d_in,), float64 on the CPU; no padding.

        Raises:
            ModelError: if rows are not on the first axis of what some module reads.
        """
        if absent := [name for name, calls in self._of_rows.items() if not any(calls)]:
            raise ModelError(
                f"{absent[0]} of {self.name} reads no tensor (rows, tokens, width), so its tokens cannot be told from "
                "padding: choose other adapter.targets, or an algorithm that needs no input norms"
            )
        accepted, found = self._moved(inputs), dict[str, Tensor]()
        mask, of_rows = accepted.get("attention_mask"), {name: iter(calls) for name, calls in self._of_rows.items()}

        def look(name: str, x: Tensor) -> None:
            if name in of_rows and next(of_rows[name], False):
                x = x.double().square()
                x = x if mask is None else x.reshape(*mask.shape, -1) * mask.unsqueeze(-1)
                found[name] = x.flatten(0, -2).sum(0).cpu() + found.get(name, 0)

        with watched(self._adapted, look):
            self._transformer(**accepted)
        return found

    @torch.no_grad()
    def _tried(self, count: int) -> tuple[Tensor, dict[str, list[int]]]:
        """Last hidden states of one row or two; and adapted module -> the length of what it reads in each call."""
        lengths, what = dict[str, list[int]](), f"{self.name}, a {type(self._transformer).__name__},"
        try:
            batch = self._moved(self.batch(self.sample(), [0, 1]))
            accepted = {name: tensor[:count] for name, tensor in batch.items()}
            with loading.quiet(), watched(self._adapted, lambda name, x: lengths.setdefault(name, []).append(len(x))):
                states: Tensor = self._transformer(**accepted).last_hidden_state
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{what} makes no features of {self.kind}s alone: {loading.reason(error)}") from error
        found = states if self.kind == "text" else as_tokens(states)
        tokens = accepted["input_ids"].shape[1:] if self.kind == "text" else found.shape[1:-1]
        if found.dim() != 3 or found.shape[:-1] != (count, *tokens):
            raise ModelError(
                f"{what} gives a tensor {tuple(states.shape)} for {count} {self.kind}; expected (rows, tokens, width): "
                "choose a transformer that keeps its tokens apart, such as BERT, Llama, ViT or Swin"
            )
        return states, lengths

    def _seeded(self, inputs: Batch, seed: int) -> Any:
        """One pass that drops out; it needs the global generator, which is put back afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self._transformer.train(self.dropout)
            keep_statistics(self._transformer)
            try:
                return self._transformer(**inputs)
            finally:
                self._transformer.eval()

    def pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, t, d) -> (rows, d); padding takes no part."""
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        match self.pooling:
            case "cls":
                return hidden[:, 0]
            case "mean":
                weights = mask.to(hidden.dtype)
                return (weights.unsqueeze(1) @ hidden).squeeze(1) / weights.sum(1, keepdim=True)
            case _:
                return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


@dataclass(frozen=True)
class _Represented:
    """As `celora.core.task.Representation`."""

    backbone: Backbone
    states: Tensor
    mask: Tensor | None

    @property
    def features(self) -> Tensor:
        return self.backbone.pool(self.states, self.mask)

    def token_losses(self, labels: Tensor) -> Tensor:
        if self.backbone.head is None:
            raise ModelError(f"{self.backbone.name} is no language model, so it predicts no tokens")
        return self.backbone.head.losses(self.states, labels.to(self.states.device, non_blocking=True))

    def embedded(self, content: Literal["image", "text"], weights: Tensors) -> Tensor:
        raise ModelError(NO_DUAL.format(self.backbone.name))

    @property
    def similarity(self) -> None:
        return None


def load(model: Model, adapter: Adapter, base: Path, architecture: Architecture = "encoder") -> Backbone:
    """Load and adapt the backbone; a relative folder is looked up from `base`.

    Raises:
        ModelError: if it is missing, incomplete or not allowed, or if `adapter.targets` matches nothing.
    """
    # oneDNN keeps a compiled kernel for each shape it has seen, 1,024 of them: 50 MB, and no faster than with a few
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    found, tokenizer, source = loading.fetch(model.backbone, base, model.allow_download, dtype, architecture)
    return Backbone(found, tokenizer, source, model=model, adapter=adapter, architecture=architecture)
