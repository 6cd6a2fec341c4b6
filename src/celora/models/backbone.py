"""The frozen backbone: loaded once, adapted by stock PEFT, shared by every client of the process."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from celora.core.learner import Batch
from celora.core.task import Architecture, HeadOf, Representation
from celora.errors import ModelError
from celora.models import capacity, fingerprint, loading, placement, targets
from celora.models.checkpointing import Checkpoints
from celora.models.dropping import seeded
from celora.models.feature_maps import as_tokens, numbers_put_out, patches
from celora.models.inputs import inputs_of
from celora.models.language import LanguageHead, answered
from celora.models.pooling import pooled
from celora.models.represented import Represented
from celora.models.row_reader import RowReader
from celora.models.settings import Adapter, Model, Pooling
from celora.models.slots import Update, bound, inject, reads_maps, transposed
from celora.models.task_classes import TaskClass, task_class
from celora.models.watching import squares, tried
from celora.tensors import Tensors

_ACCEPTED = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
_TRIED = 2
"""Rows that a language model is tried on, where each has a logit for every word."""
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
        device: where it runs; of several, the one where rows enter and leave it.
        scalings: adapted module -> s, the factor of ΔW.
        fan_in_fan_out: whether the adapted modules store Wᵀ, as GPT-2's do; PEFT wants to know.
        convolutions: those of the adapted modules that are 1 × 1 convolutions.
        positions: of the map that an image becomes; None where it becomes tokens.
        layers: its layers, from the input up.
        depth: frozen layers below the first adapted one, whose work need not be repeated; 0 with dropout.
        longest: tokens that a text may have; None for images.
        rows_first: whether clients can share a pass: the first axis of what adapted modules read is that of rows, as it
            is not in XLNet and Longformer, nor where DeBERTa projects positions; and no row looks at others, as layers
            of 8 bits do for columns with outliers.
        dropout: whether the backbone's own dropout is on while training; dtype: of weights that are no packed bits.
        tokenizer: None for images.
        name: as it was asked for; source: the folder or the Hub id it was loaded from.
        head: of a language model; None where hidden states are all that is read.
        prefix: where the transformer lies in the model that it was loaded as, "" or such as "model.".
        tower: the image encoder that reads for this backbone, if it has one of its own.
        own_head: tensors `head.*` that the backbone itself brings, as they start; they are trained as a task's are.
        saved: modules that are trained whole and have a place in the class of transformers.
        joined: whether it is put together here of two models, as no class of transformers is.
        pooling: how a row's token vectors become one vector: `model.pooling`, or what becomes this backbone.

    Raises:
        ModelError: if it cannot read texts of `max_length`, has no such targets or layers, or gives no vector for each
            token.
    """

    def __init__(
        self,
        found: loading.Fetched,
        *,
        model: Model,
        adapter: Adapter,
        architecture: Architecture = "encoder",
        adapted: bool = True,
        projector: Sequence[str] = (),
    ) -> None:
        whole: Any = found.transformer
        tokenizer, self._folder = found.tokenizer, found.folder
        self.head = LanguageHead(whole) if architecture in ("causal-lm", "image-text") else None
        self.prefix = f"{whole.base_model_prefix}." if self.head and whole.base_model_prefix else ""
        self.own_head: Tensors = {}
        self.tower: Backbone | None = None
        self.saved, self.joined = tuple[str, ...](), False
        transformer = whole.base_model if self.head else whole
        kind = loading.kind(transformer)
        self.longest = loading.longest(transformer, tokenizer) if kind == "text" else None
        if self.longest is not None and model.max_length > self.longest:
            most = self.longest
            raise ModelError(f"model.max_length = {model.max_length}, but {model.backbone} reads at most {most}")
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
        self.depth = 0 if model.dropout or projector or not names else targets.below(names, layers)
        self.scalings = {name: adapter.factor_at(name) for name in self._adapted}
        self.fan_in_fan_out = any(map(transposed, self._adapted.values()))
        self.convolutions = frozenset(name for name, layer in self._adapted.items() if reads_maps(layer))
        self.device = placement.first_device(whole, model)
        self.dropout, self.dtype = model.dropout, placement.dtype_of(model)
        decides = architecture == "encoder" and kind == "text" and model.pooling in (None, "last")
        self._sequence = task_class(transformer, "sequence") if decides else None
        self.pooling: Pooling = model.pooling or ("last" if self._sequence else "mean")
        config: Any = transformer.config
        typed = not self._sequence and "token_type_ids" in signature(transformer.forward).parameters  # decoders: none
        super().__init__(kind, tokenizer, found.source, model=model, config=config, typed=typed)
        self._whole: nn.Module = whole.requires_grad_(False).eval()
        if model.device_map is None and model.quantise is None:  # others lie where they are to be
            self._whole.to(self.device)
        self._transformer = transformer
        above = dict(list(layers.items())[self.depth :]) if model.gradient_checkpointing else {}
        self._checkpoints = Checkpoints(above, self._adapted)
        (_, one), (states, two) = self._tried(1), self._tried(2)
        self.positions = math.prod(states.shape[2:]) if states.dim() == 4 else None
        if self.positions and self.pooling != "mean":
            raise ModelError(f'model.pooling = "{self.pooling}", but {self.name} makes a map of an image: use "mean"')
        self.width = as_tokens(states).shape[-1]
        # a call has rows on the first axis of what it reads if that is twice as long for two of them
        calls = {name: zip(one.get(name, [0]), two.get(name, [1]), strict=False) for name in self.targets}
        self._of_rows = {name: [2 * n == m for n, m in lengths] for name, lengths in calls.items()}
        self.rows_first = all(map(all, self._of_rows.values())) and model.quantise != "8bit"
        if self.head:
            self.head.check(self.name, partial(self.states, updates={}), self.accepted(self.batch(self.sample(), [0])))

    @property
    def module(self) -> Any:
        """The frozen model, with its head if it is a language model; Slots stand at the adapted modules."""
        return self._whole

    @cached_property
    def _digest(self) -> str:
        if self._folder is None:
            return fingerprint.of_weights(self._whole.state_dict())
        return fingerprint.of_files(self._folder, f"{self._model.dtype} {self._model.quantise or ''}".strip())

    def fingerprint(self) -> str:
        """What tells this backbone from others, whatever adapts it (`celora.models.fingerprint`)."""
        return self._digest

    def weight(self, module: str) -> Tensor:
        """The frozen weight of an adapted module, (d_out, d_in) float64 on the CPU.

        Raises:
            ModelError: if it is packed, or not in memory.
        """
        layer = self._adapted[module]
        weight: Tensor = layer.get_base_layer().weight.detach()
        if weight.is_meta or not weight.is_floating_point():
            raise ModelError(f"the weight of {module} is packed or on the disk: use another adapter.init")
        weight = weight.cpu().double()
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
        return patches(self._config, self.image_shape) + 1

    @property
    def pads(self) -> bool:
        """Whether it reads off its convolutions how to pad, as transformers' MobileNets do."""
        return bool(self._config.to_dict().get("tf_padding"))

    @cached_property
    def capacity(self) -> int:
        """Tokens in one pass (`celora.models.capacity`); activations of convolutions are counted."""
        if self.device.type != "cuda":
            return capacity.on_cpu(self.width)
        free, _ = torch.cuda.mem_get_info(self.device)
        chunk, number = self.head.chunk_bytes if self.head else 0, self.dtype.itemsize
        if self.positions:
            with bound(self._adapted, {}):
                numbers = numbers_put_out(self._transformer, self.accepted(self.batch(self.sample(), [0])))
            return capacity.fitting(free, numbers * number / self.positions)
        longest = self._model.max_length if self.kind == "text" else self.image_tokens
        config, again = self._config.get_text_config(), self._model.gradient_checkpointing
        return capacity.fitting(free, capacity.of_layers(config, longest, number, again), chunk)

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
            states, mask = self.states(inputs, updates, dropout_seed)
        return Represented(self.name, self.head, self.pool, states, mask)

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
        accepted = self.accepted(inputs)
        states: Tensor = self._run(accepted, updates, dropout_seed).last_hidden_state
        return as_tokens(states.to(self.device).float()), accepted.get("attention_mask")

    def _run(self, accepted: Mapping[str, Tensor], updates: Mapping[str, Update], dropout_seed: int | None) -> Any:
        """What the transformer puts out for what it accepts of a batch."""
        again = self._checkpoints(updates, random=dropout_seed is not None)
        drawn = seeded(self._transformer, dropout_seed, self.dropout, self.device)
        with bound(self._adapted, updates), again, drawn:
            return self._transformer(**accepted)

    def own_updates(self, weights: Tensors) -> dict[str, Update]:
        """What is added to modules that are trained whole; none."""
        return {}

    def trial(self) -> dict[str, Tensor]:
        """A few rows that nobody owns, to try an export on, on the CPU."""
        sample = self.sample()
        return self.batch(sample, range(min(len(sample), _TRIED) if self.head else len(sample)))

    def put_out(self, model: Any, batch: Batch) -> Tensor:
        """Logits, or hidden states (rows, t, d), of a model of transformers or of PEFT's for a batch, float32."""
        found = model(**self.accepted(batch))
        return found.logits.float() if self.head else as_tokens(found.last_hidden_state.float())

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
                device=self.device,
            )
        return [text.text(ids) for ids in found]

    def accepted(self, inputs: Batch) -> dict[str, Tensor]:
        """What the transformer reads of a batch, on the device; the copy does not wait."""
        accepted = {name: inputs[name] for name in _ACCEPTED if name in inputs}
        if self.device.type == "cuda":  # what lies there already cannot be pinned
            accepted = {name: one if one.is_cuda else one.pin_memory() for name, one in accepted.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in accepted.items()}

    def squares(self, inputs: Batch) -> dict[str, Tensor]:
        """Adapted module -> the sum over all tokens of its squared inputs (d_in,), float64 on the CPU; no padding.

        Raises:
            ModelError: if rows are not on the first axis of what some module reads.
        """
        return squares(self._transformer, self._adapted, self.accepted(inputs), self._of_rows, self.name)

    def _tried(self, count: int) -> tuple[Tensor, dict[str, list[int]]]:
        """As `tried`, of one row or two of the sample."""

        def rows() -> dict[str, Tensor]:
            batch = self.accepted(self.batch(self.sample(), [0, 1]))
            return {name: tensor[:count] for name, tensor in batch.items()}

        return tried(self._transformer, self._adapted, rows, kind=self.kind, name=self.name, device=self.device)

    def pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, t, d) -> (rows, d); padding takes no part."""
        return pooled(hidden, mask, self.pooling)


def load(model: Model, adapter: Adapter, base: Path, architecture: Architecture = "encoder") -> Backbone:
    """Load and adapt the backbone; a relative folder is looked up from `base`.

    Raises:
        ModelError: if it is missing, incomplete or not allowed, or if `adapter.targets` matches nothing.
    """
    # oneDNN keeps a compiled kernel for each shape it has seen, 1,024 of them: 50 MB, and no faster than with a few
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    return Backbone(loading.fetch(model, base, architecture), model=model, adapter=adapter, architecture=architecture)
