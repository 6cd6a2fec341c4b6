"""The frozen backbone: loaded once, adapted by stock PEFT, shared by every client of the process."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celora.core.learner import Batch
from celora.errors import ModelError
from celora.fields import Count, Positive, setting, settings
from celora.models import sources
from celora.models.image_processor import FILE as PROCESSOR
from celora.models.image_processor import ImageProcessor, image_processor
from celora.models.inputs import DecodedImages, Images, Inputs, Texts, TokenisedTexts, collate, inputs_of
from celora.models.slots import Update, bound, inject

_ACCEPTED = ("input_ids", "attention_mask", "pixel_values")
LAYERS = r"^(all|last:[1-9][0-9]*)$"
_REGISTER = 16
"""Tokens that a prefix is padded to a multiple of: float32 numbers in the widest vector register."""
_PASS = 1024 * 384
"""Numbers in one hidden state of a pass on a CPU: MiniLM, 384 wide, is fastest at 512 to 1024 tokens."""
_LEAST = 512
"""Tokens in a pass, at least."""


@settings
class Model:
    """The frozen backbone."""

    backbone: str = setting("minilm", '"minilm" (embedded), "random-vit", a local folder, or a Hub id')
    own: tuple[str, ...] | None = setting(
        None,
        'instead of one backbone, whole models of the clients\' own, dealt to them in turn: "cnn-1" … "cnn-5", '
        'or "minilm:4" for the lowest layers of an encoder',
        min_length=1,
    )
    allow_download: bool = setting(False, "may the Hub be asked? otherwise only its local cache is read")
    pooling: Literal["mean", "cls", "last"] = setting("mean", "how a row's token vectors become one vector")
    max_length: Count = setting(128, "tokens kept of a text")
    dropout: bool = setting(False, "the backbone's own dropout while training")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the frozen weights; adapters are float32")
    device: str = setting("auto", '"auto": CUDA if there is one, else "cpu"; or a torch device')


@settings
class Adapter:
    """The low-rank adapter at each adapted module, ΔW = s · B (C) A with s = alpha / rank, one s for all clients."""

    rank: Count = setting(8, "r; where clients have ranks of their own, the largest of them")
    ranks: Mapping[str, Count] | tuple[Count, ...] | None = setting(
        None,
        "{client = r, …}, others having `rank`; or tiers such as [2, 4, 8], each for as many clients; none: all `rank`",
    )
    alpha: Positive | None = setting(None, "s = alpha / rank; by default 2 · rank, as is common, so s = 2")
    targets: tuple[str, ...] | str = setting(
        ("query", "value"), 'PEFT\'s way: suffixes of module names, one regular expression, or "all-linear"'
    )
    layers: str = setting("all", 'which transformer layers: "all", or the topmost n as "last:n"', pattern=LAYERS)
    init: Literal["kaiming", "normal", "orthonormal"] = setting(
        "kaiming", "A as PEFT draws it; N(0, 1e-3²) as CE-LoRA's code; or A and B orthonormal with C = 0"
    )
    bases: Literal["shared", "secret"] = setting("shared", "A from the run's seed, or from each client's secret")

    def __post_init__(self) -> None:
        if self.ranks is not None and not self.ranks:
            raise ValueError("ranks: found none, expected {client = r} or tiers such as [4, 8]")
        given = self.ranks.values() if isinstance(self.ranks, Mapping) else self.ranks or ()
        if over := [rank for rank in given if rank > self.rank]:
            raise ValueError(f"ranks: found {max(over)}, expected at most rank = {self.rank}, the largest")

    def rank_of(self, client: str, clients: Sequence[str]) -> int:
        """The rank of a client among all: its own, or its tier's, the first tier going to the first clients."""
        if self.ranks is None:
            return self.rank
        if isinstance(self.ranks, Mapping):
            return self.ranks.get(client, self.rank)
        return self.ranks[clients.index(client) * len(self.ranks) // len(clients)]

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """s, the factor of ΔW."""
        return self.lora_alpha / self.rank


class Backbone:
    """A frozen transformer whose adapted modules take their LoRA factors per call.

    Attributes:
        kind: "text" or "image".
        width: length d of a pooled feature vector.
        targets: adapted module -> (d_out, d_in).
        device: where it runs.
        scaling: s, the factor of ΔW.
        fan_in_fan_out: whether the adapted modules store Wᵀ, as GPT-2's do; PEFT wants to know.
        depth: frozen layers below the first adapted one, whose work need not be repeated; 0 with dropout.
        dropout: whether the backbone's own dropout is on while training.
        tokenizer: None for images.
        name: as it was asked for; source: the folder or the Hub id it was loaded from.
    """

    kind: Literal["text", "image"]

    def __init__(self, transformer: nn.Module, tokenizer: Any, source: str, *, model: Model, adapter: Adapter) -> None:
        config: Any = transformer.config
        if tokenizer and model.max_length > (limit := sources.longest(transformer, tokenizer)):
            raise ModelError(f"model.max_length = {model.max_length}, but {model.backbone} reads at most {limit}")
        layers = sources.layers(transformer)
        names = sources.matching(transformer, adapter.targets, model.backbone)
        names = sources.topmost(names, layers, adapter.layers, model.backbone)
        self._layers = inject(transformer, names, adapter.rank, adapter.lora_alpha)
        self.kind = sources.kind(transformer)
        self.width: int = config.hidden_size
        self.targets: dict[str, tuple[int, int]] = {
            name: (layer.out_features, layer.in_features) for name, layer in self._layers.items()
        }
        self._stack = list(layers.values())
        lowest = [at for at, path in enumerate(layers) if any(name.startswith(f"{path}.") for name in names)]
        inside = all(any(name.startswith(f"{path}.") for path in layers) for name in names)
        self.depth = lowest[0] if inside and not model.dropout else 0
        self._answers_tuples = False
        self.scaling = adapter.scaling
        self.fan_in_fan_out = any(bool(layer.fan_in_fan_out) for layer in self._layers.values())
        self.device = device_of(model.device)
        self.dropout = model.dropout
        self.tokenizer, self.name, self.source = tokenizer, model.backbone, source
        self._model, self._config = model, config
        self._transformer = transformer.requires_grad_(False).eval().to(self.device)

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._transformer.state_dict().items():
            head = f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}\n"
            digest.update(head.encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and values of the frozen weights, whatever adapts them."""
        return self._digest

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
        return [list(ids) or [self._padding] for ids in found]

    @property
    def _padding(self) -> int:
        """A token to pad with; which one does not matter, for padding is masked."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in candidates if token is not None), 0)

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes: its patches and one for the class; 1 for a text backbone."""
        if self.kind == "text":
            return 1
        patch = self._config.to_dict().get("patch_size") or 16
        down, across = (patch, patch) if isinstance(patch, int) else patch
        _, height, width = self.image_shape
        return (height // down) * (width // across) + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images an image backbone reads."""
        side = self._config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return self._config.num_channels, height, width

    def read(self, rows: Texts | Images, budget: int) -> Inputs:
        """The rows of a source as this backbone reads them, made when they are first needed.

        Args:
            budget: bytes of token ids or pixels in memory.

        Raises:
            ModelError: as `check`.
            DataError: if images differ in size and the backbone brings no processor that makes them alike.
        """
        inputs: Inputs
        if rows.kind == "text":
            inputs = TokenisedTexts(self.tokenize, rows, budget)
        else:
            prepare: ImageProcessor | None = None
            notices: tuple[str, ...] = ()
            if self.kind == "image":
                prepare = image_processor(self.source, self.image_shape[0])
            if prepare is None and rows[0].dtype == torch.uint8:
                notices = (f"pixels are divided by 255: {self.name} brings no image processor ({PROCESSOR})",)
            inputs = DecodedImages(rows, prepare, budget, notices)
        self.check(inputs)
        return inputs

    def check(self, rows: Inputs | Sequence[Sequence[int]] | Tensor) -> None:
        """Refuse rows this backbone cannot read.

        Raises:
            ModelError: naming what was found and what is expected.
        """
        name, inputs = self._model.backbone, inputs_of(rows)
        if inputs.kind != self.kind:
            raise ModelError(f"{name} reads {self.kind}s; found {inputs.kind}s: choose another model.backbone")
        if self.kind == "image" and inputs.shape != self.image_shape:
            raise ModelError(f"{name} reads images of shape {self.image_shape}; found {inputs.shape}: resize them")

    @cached_property
    def capacity(self) -> int:
        """Tokens in one pass: what is fastest on a CPU; on CUDA what half of the free memory holds.

        Activations take h (34 + 5 a t / h) bytes a token and layer at 2 bytes a number, twice that at 4 (Korthikanti
        et al., MLSys 2023, equation 2; a heads, t tokens a row, here the longest that is read).
        """
        if self.device.type != "cuda":
            return max(_LEAST, _PASS // self.width)
        free, _ = torch.cuda.mem_get_info(self.device)
        config, width = self._config, 2 if self._model.dtype == "bfloat16" else 4
        longest = self._model.max_length if self.kind == "text" else self.image_tokens
        inner = 34 * self.width + 5 * config.num_attention_heads * longest
        return max(_LEAST, int(free / 2 / (config.num_hidden_layers * inner * width / 2)))

    def batch(self, rows: Inputs | Sequence[Sequence[int]] | Tensor, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Some of the rows as tensors on the CPU, as `collate` makes them."""
        return collate(inputs_of(rows).fetch(chosen), self._padding if self.kind == "text" else 0)

    def encode(
        self,
        inputs: Batch,
        updates: Mapping[str, Update],
        dropout_seed: int | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Pooled features (rows, d), float32.

        Args:
            inputs: what `batch` made; other keys are ignored.
            updates: module -> what is added to its output, over s; a missing module stays frozen, so `{}` gives the
                features of the backbone itself.
            dropout_seed: given, the backbone's own dropout is on and draws from this seed.
            hidden: (rows, t, d), what `prefix` gives for these rows, 0 where they are padded: the layers below
                `depth` are then passed over.
        """
        accepted = self._moved(inputs)
        with bound(self._layers, updates):
            if dropout_seed is not None:
                states = self._with_dropout(accepted, dropout_seed)
            elif hidden is not None and self.depth:
                with self._from(hidden):
                    states = self._transformer(**accepted).last_hidden_state
            else:
                states = self._transformer(**accepted).last_hidden_state
        return self._pool(states.float(), accepted.get("attention_mask"))

    def _moved(self, inputs: Batch) -> dict[str, Tensor]:
        """What the transformer reads of a batch, on the device; the copy does not wait."""
        accepted = {name: inputs[name] for name in _ACCEPTED if name in inputs}
        if self.device.type != "cuda":
            return {name: tensor.to(self.device) for name, tensor in accepted.items()}
        return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in accepted.items()}

    @torch.no_grad()
    def prefix(self, inputs: Batch) -> list[Tensor]:
        """Hidden states (t, d) of each row where it enters the first adapted layer, on the CPU; no padding.

        Texts are padded to a multiple of 16 tokens. Then every row's numbers fill whole vector registers, and on a CPU
        its result has the same bits in whatever company (a test holds it to that).
        """
        mask = inputs.get("attention_mask")
        if mask is not None:
            limit = sources.longest(self._transformer, self.tokenizer)
            more = (0, min(-(-mask.shape[1] // _REGISTER) * _REGISTER, limit) - mask.shape[1])
            ids = F.pad(inputs["input_ids"], more, value=self._padding)
            inputs = {"input_ids": ids, "attention_mask": F.pad(mask, more)}
        below, first = self._stack[self.depth - 1], self._stack[self.depth]

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _ReachedError(args[0] if args else kwargs["hidden_states"])

        def look(module: nn.Module, args: Any, answer: Any) -> None:
            self._answers_tuples = isinstance(answer, tuple)

        hooks = below.register_forward_hook(look), first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with bound(self._layers, {}):
                self._transformer(**self._moved(inputs))
        except _ReachedError as reached:
            hidden = reached.hidden.cpu()
        finally:
            for hook in hooks:
                hook.remove()
        lengths = [hidden.shape[1]] * len(hidden) if mask is None else mask.sum(1).tolist()
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    @torch.no_grad()
    def squares(self, inputs: Batch) -> dict[str, Tensor]:
        """Adapted module -> the sum over all tokens of its squared inputs (d_in,), float64 on the CPU; no padding."""
        accepted, found = self._moved(inputs), dict[str, Tensor]()
        mask = accepted.get("attention_mask")

        def look(name: str, module: nn.Module, args: Any) -> None:
            x = args[0].double().square()
            x = x if mask is None else x * mask.unsqueeze(-1)
            found[name] = x.flatten(0, -2).sum(0).cpu()

        hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in self._layers.items()]
        try:
            with bound(self._layers, {}):
                self._transformer(**accepted)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextmanager
    def _from(self, hidden: Tensor) -> Iterator[None]:
        """Within this context the layers below `depth` pass on what they get, the lowest of them `hidden`."""

        def passing(at: int) -> Callable[..., Any]:
            def forward(states: Tensor, *_: Any, **__: Any) -> Any:
                states = hidden.to(states.device, states.dtype) if at == 0 else states
                return (states,) if self._answers_tuples else states

            return forward

        below = self._stack[: self.depth]
        for at, layer in enumerate(below):
            layer.forward = passing(at)
        try:
            yield
        finally:
            for layer in below:
                del layer.forward  # the class's own shows again

    def _with_dropout(self, inputs: Batch, seed: int) -> Tensor:
        """One pass in training mode; it needs the global generator, which is put back afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self._transformer.train()
            try:
                hidden: Tensor = self._transformer(**inputs).last_hidden_state
                return hidden
            finally:
                self._transformer.eval()

    def _pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(rows, t, d) -> (rows, d); padding takes no part."""
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        match self._model.pooling:
            case "cls":
                return hidden[:, 0]
            case "mean":
                weights = mask.to(hidden.dtype)
                return (weights.unsqueeze(1) @ hidden).squeeze(1) / weights.sum(1, keepdim=True)
            case _:
                return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


class _ReachedError(Exception):
    """The first adapted layer was reached; no more is to be computed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def device_of(name: str) -> torch.device:
    """The torch device of `model.device`.

    Raises:
        ModelError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f'model.device = "{name}" is unknown; expected "auto", "cpu" or "cuda"') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f'model.device = "{name}", but torch finds no CUDA device here: use "auto" or "cpu"')
    return device


def load(model: Model, adapter: Adapter, base: Path) -> Backbone:
    """Load and adapt the backbone; a relative folder is looked up from `base`.

    Raises:
        ModelError: if it is missing, incomplete or not allowed, or if `adapter.targets` matches nothing.
    """
    # oneDNN keeps a compiled kernel for each shape it has seen, 1,024 of them: 50 MB, and no faster than with a few
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    transformer, tokenizer, source = sources.fetch(model.backbone, base, model.allow_download, dtype)
    return Backbone(transformer, tokenizer, source, model=model, adapter=adapter)
