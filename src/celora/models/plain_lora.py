"""A client's adapter as plain LoRA: two matrices at each module, one s for all of them, and PEFT's words for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.core.adapters import Family, modules
from celora.lazy import Lazy
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.pissa import Start
from celora.models.settings import Adapter
from celora.models.task_classes import TASK_TYPES, TaskClass
from celora.tensors import Tensors

peft = Lazy("peft")
ROOT = "base_model.model."
"""Where PEFT puts a model into its own."""
SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for: the values of its `--max-lora-rank`."""


def served(rank: int) -> int:
    """The least rank that vLLM serves an adapter of this rank by; the rank itself where there is none.

    >>> [served(rank) for rank in (1, 5, 8, 257, 600)]
    [1, 8, 8, 320, 600]
    """
    return next((one for one in SERVED if one >= rank), rank)


@dataclass(frozen=True)
class PlainLora:
    """An adapter as stock PEFT keeps it.

    Attributes:
        rank: the largest of its modules, those that only fill it up included.
        prefix: where the transformer lies in the class that it is for.
        config: `peft.LoraConfig`.
        state: what is in `adapter_model.safetensors`, by PEFT's names.
    """

    rank: int
    prefix: str
    config: Any
    state: Mapping[str, Tensor]


def factors(weights: Tensors, family: Family, start: Start) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module, by which plain LoRA does what the adapters do; nothing where it cannot.

    A core C is folded into B, and ranks side by side are one rank. Where A and B started from the frozen weights, what
    they add is how far they moved, of rank 2 r: an adapter of the weights as they are.
    """
    found = {module: family.lora(w) for module, w in modules(weights).items()}
    pairs = {module: pair for module, pair in found.items() if pair is not None}
    for module, (a0, b0) in start.items():
        a, b = pairs[module]
        pairs[module] = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    return pairs


def plain_lora(
    backbone: Backbone | DualBackbone,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    head: Tensors,
    *,
    adapter: Adapter,
    fits: TaskClass | None,
    base: str,
    pad: bool,
) -> PlainLora:
    """The adapter in PEFT's words.

    Where modules have ranks of their own, PEFT's patterns of ranks and alphas say so; alphas of modules' own are folded
    into B, so that s is one for all.

    Args:
        head: of the task, which belongs to the adapter where the class has it (`fits`); or modules of the backbone's
            own that are trained whole.
        base: what the backbone is loaded by.
        pad: whether all modules get one rank that vLLM serves, which reads no patterns; what is added is 0, and alpha
            follows the rank, so that s stays.
    """
    prefix = fits.prefix if fits else backbone.prefix
    patterned = bool(adapter.rank_pattern) and not pad
    rank = max(len(a) for a, _ in pairs.values())
    rank = served(rank) if pad else rank
    state: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        more = 0 if patterned else rank - len(a)
        of_all = backbone.scalings[module] / adapter.factor
        down, up = F.pad(a, (0, 0, 0, more)), F.pad(b if of_all == 1 else of_all * b, (0, more))
        kernel = (1, 1) if module in backbone.convolutions else ()
        state[f"{ROOT}{prefix}{module}.lora_A.weight"] = down.reshape(*down.shape, *kernel)
        state[f"{ROOT}{prefix}{module}.lora_B.weight"] = up.reshape(*up.shape, *kernel)
    if fits:
        state |= {name.replace("head", f"{ROOT}{fits.head}", 1): tensor for name, tensor in head.items()}
    if backbone.saved:
        state |= {f"{ROOT}{prefix}{name.removeprefix('head.')}": tensor for name, tensor in head.items()}
    own = {f"{prefix}{module}": len(a) for module, (a, _) in pairs.items() if patterned and len(a) != rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=adapter.factor * adapter.divisor(rank),  # PEFT declares an int and takes a float
        target_modules=[f"{prefix}{module}" for module in backbone.targets],
        task_type=_task_type(backbone, fits),
        modules_to_save=[fits.head] if fits else [f"{prefix}{module}" for module in backbone.saved] or None,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.scaling == "rslora",
        rank_pattern=own,
        alpha_pattern={module: adapter.factor * adapter.divisor(r) for module, r in own.items()},
        fan_in_fan_out=backbone.fan_in_fan_out,
        inference_mode=True,
        base_model_name_or_path=base,
    )
    return PlainLora(rank, prefix, config, state)


def _task_type(backbone: Backbone | DualBackbone, fits: TaskClass | None) -> str | None:
    """PEFT's word for the task; none for images, to whose models PEFT's tasks hand on what texts have."""
    if fits:
        return TASK_TYPES[fits.of]
    if backbone.head:
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if isinstance(backbone, Backbone) and backbone.kind == "text" else None
