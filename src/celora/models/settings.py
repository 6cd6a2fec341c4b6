"""What a user sets: `[model]`, the frozen backbone, and `[adapter]`, what is trained on it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from celora.fields import Count, Positive, setting, settings

V = TypeVar("V")
Pooling = Literal["mean", "cls", "last"]
SIGN = " + "
"""Between the names of an image model and a text model that are one backbone."""
LAYERS = r"^(all|last:[1-9][0-9]*)$"


def _no_gradients(init: Any) -> Any:
    """Say why one start that users of PEFT know is none of ours."""
    if init == "lora-ga":
        raise ValueError(
            "'lora-ga' starts from the gradient of every frozen weight over all clients' rows, d_out · d_in numbers a "
            "module, and clients send no such thing; expected 'pissa', which starts from the frozen weights themselves"
        )
    return init


@settings
class Model:
    """The frozen backbone."""

    backbone: str = setting(
        "minilm",
        '"minilm" (embedded), "smollm2", "efficientnet-lite0" (packages), "random-vit", a local folder, a .gguf file, '
        'or a Hub id; of an image and a text tower: "efficientnet-lite0 + minilm"',
    )
    own: tuple[str, ...] | None = setting(
        None,
        'instead of one backbone, whole models of the clients\' own, dealt to them in turn: "cnn-1" … "cnn-5", '
        'or "minilm:4" for the lowest layers of an encoder',
        min_length=1,
    )
    allow_download: bool = setting(False, "may the Hub be asked? otherwise only its local cache is read")
    pooling: Pooling | None = setting(
        None,
        "how a row's token vectors become one vector; none: the last token of a decoder that transformers has a "
        "sequence classifier of, else the mean",
    )
    max_length: Count = setting(128, "tokens kept of a text")
    image_size: Count | None = setting(
        None, "pixels of a side that images are resized to; none: as the backbone's own image processor says"
    )
    dropout: bool = setting(False, "the backbone's own dropout while training")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the frozen weights; adapters are float32")
    quantise: Literal["4bit", "8bit"] | None = setting(
        None, "the frozen linear layers in so few bits, by bitsandbytes (4bit: NF4); adapters stay float32"
    )
    gradient_checkpointing: bool = setting(
        False, "keep what enters each layer and compute the rest again going back: less memory, a third more work"
    )
    device: str = setting("auto", '"auto": CUDA if there is one, else "cpu"; or a torch device')
    device_map: Literal["auto"] | Mapping[str, int | str] | None = setting(
        None,
        'instead of device, where a backbone too large for one lies: "auto", or {module = device, …}, a device being '
        '0, "cpu", "disk", …',
    )

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"device: found {self.device!r} beside device_map, which says where each module lies; remove one"
            )
        if self.device_map is not None and not self.device_map:
            raise ValueError('device_map: found nothing in it, expected "auto" or {module = device, …}')
        large = {
            "quantise": self.quantise is not None,
            "gradient_checkpointing": self.gradient_checkpointing,
            "device_map": self.device_map is not None,
        }
        if self.own is not None and (found := [name for name, given in large.items() if given]):
            raise ValueError(f"{' and '.join(found)} cannot be set with own: they are for a frozen backbone; remove it")


@settings
class Adapter:
    """The low-rank adapter at each adapted module, ΔW = s · B (C) A, one s for all clients, whatever their rank."""

    rank: Count = setting(8, "r; where clients have ranks of their own, the largest of them")
    ranks: Mapping[str, Count] | tuple[Count, ...] | None = setting(
        None,
        "{client = r, …}, others having `rank`; or tiers such as [2, 4, 8], each for as many clients; none: all `rank`",
    )
    alpha: Positive | None = setting(None, "s follows from it; by default 2 · rank, as is common, so s = 2")
    scaling: Literal["standard", "rslora"] = setting("standard", "s = alpha / rank; or rsLoRA's s = alpha / √rank")
    rank_pattern: Mapping[str, Count] | None = setting(
        None,
        "{pattern = r, …} for some modules, matched as PEFT does: a regular expression, the end of a module's name",
    )
    alpha_pattern: Mapping[str, Positive] | None = setting(None, "{pattern = alpha, …} for some modules, likewise")
    dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "LoRA dropout: the share of the numbers an adapter reads that is set to 0 while training"
    )
    targets: tuple[str, ...] | str = setting(
        "auto",
        'PEFT\'s way: suffixes of module names, one regular expression, or "all-linear"; "auto": PEFT\'s own '
        "default for the architecture",
    )
    layers: str = setting("all", 'which transformer layers: "all", or the topmost n as "last:n"', pattern=LAYERS)
    projector: bool = setting(False, "train the projector between images and language model, too, as a head")
    towers: Literal["both", "image", "text"] = setting("both", "which towers of a dual encoder are adapted")
    init: Annotated[Literal["kaiming", "normal", "orthonormal", "pissa"], BeforeValidator(_no_gradients)] = setting(
        "kaiming",
        "A as PEFT draws it; N(0, 1e-3²) as CE-LoRA's code; A and B orthonormal with C = 0; or both from the largest "
        "singular values of the frozen weight",
    )
    bases: Literal["shared", "secret"] = setting("shared", "A from the run's seed, or from each client's secret")

    def __post_init__(self) -> None:
        if self.ranks is not None and not self.ranks:
            raise ValueError("ranks: found none, expected {client = r} or tiers such as [4, 8]")
        given = self.ranks.values() if isinstance(self.ranks, Mapping) else self.ranks or ()
        if over := [rank for rank in given if rank > self.rank]:
            raise ValueError(f"ranks: found {max(over)}, expected at most rank = {self.rank}, the largest")
        if self.scaling == "rslora" and self.alpha is None:
            raise ValueError(
                "alpha: found none, expected a number: with scaling = 'rslora', s = alpha / √rank, alpha is what stays "
                "when the rank is another, so it has no default that follows the rank"
            )
        for pattern in (*(self.rank_pattern or ()), *(self.alpha_pattern or ())):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"found the pattern {pattern!r}, expected a regular expression: {error}") from error

    def rank_of(self, client: str, clients: Sequence[str]) -> int:
        """The rank of a client among all: its own, or its tier's, the first tier going to the first clients."""
        if self.ranks is None:
            return self.rank
        if isinstance(self.ranks, Mapping):
            return self.ranks.get(client, self.rank)
        return self.ranks[clients.index(client) * len(self.ranks) // len(clients)]

    def rank_at(self, module: str) -> int:
        """The rank of an adapted module."""
        return _of(self.rank_pattern, module, self.rank)

    def factor_at(self, module: str) -> float:
        """s at an adapted module."""
        return _of(self.alpha_pattern, module, self.lora_alpha) / self.divisor(self.rank_at(module))

    @property
    def lora_alpha(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def factor(self) -> float:
        """s, the factor of ΔW, at modules that match no pattern."""
        return self.lora_alpha / self.divisor(self.rank)

    def divisor(self, rank: int) -> float:
        """alpha / s at this rank."""
        return rank if self.scaling == "standard" else math.sqrt(rank)

    @property
    def factors(self) -> tuple[object, ...]:
        """What decides s at every module: adapters that agree on it can share a backbone, whatever their rank."""
        if not self.rank_pattern and not self.alpha_pattern:
            return (self.factor,)
        return self.factor, self.lora_alpha, self.scaling, repr(self.rank_pattern), repr(self.alpha_pattern)

    @property
    def exported(self) -> "Adapter":
        """How an export is read: plain LoRA with one s, that of no pattern, over the frozen weights as they are."""
        return replace(self, rank_pattern=None, alpha_pattern=None, init="kaiming")


def matches(pattern: str, module: str) -> bool:
    """Whether a module's name ends in the pattern, as `peft.utils.other.get_pattern_key` sees it."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _of(patterns: Mapping[str, V] | None, module: str, otherwise: V) -> V:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in (patterns or {}).items() if matches(pattern, module)), otherwise)
