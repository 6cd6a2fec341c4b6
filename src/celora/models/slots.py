"""Adapters that are handed in: stock PEFT layers that hold nothing of their own.

PEFT wraps the target modules and computes `W x + s · lora_B(lora_A(x))`; here `lora_A` hands x on and `lora_B` is a
`Slot`, which adds whatever function is bound to it. One backbone then serves any number of clients and any family of
adapters (`celora.core.adapters`): a client update binds its functions, runs, and unbinds.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from celora.core.adapters import Family, linear
from celora.lazy import Lazy
from celora.models.settings import Adapter
from celora.tensors import Tensors

peft = Lazy("peft")
_ADAPTER = "default"


Update = Callable[[Tensor], Tensor]
"""x (rows, ..., d_in) -> Δ(x) (rows, ..., d_out)."""


def adding(family: Family, w: Tensors) -> Update:
    """Δ(x) of a family's matrices, which follow x to the device where its module lies."""
    return lambda x: family.delta(x, {part: matrix.to(x.device) for part, matrix in w.items()})


def dropping(update: Update, rate: float) -> Update:
    """LoRA dropout: Δ of x with this share of its numbers set to 0, and the others scaled up."""
    return lambda x: update(F.dropout(x, rate))


def less(update: Update, a: Tensor, b: Tensor) -> Update:
    """Δ(x) − B A x."""
    return lambda x: update(x) - linear(linear(x, a.to(x.device)), b.to(x.device))


class Slot(nn.Module):
    """Δ, handed in for one pass.

    Args:
        map: whether it reads maps (rows, d_in, h, w), as a convolution does.
    """

    def __init__(self, *, map: bool = False) -> None:
        super().__init__()
        self.update: Update | None = None
        self._map = map

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., d_in) -> (rows, ..., d_out); or (rows, d_in, h, w) -> (rows, d_out, h, w)."""
        if self.update is None:
            raise RuntimeError("this module's adapter is not bound")
        return self.update(x.movedim(1, -1)).movedim(-1, 1) if self._map else self.update(x)


class _Passing(nn.Module):
    """Hands x on, in the dtype of its weight: PEFT casts to that."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(0)  # adapters are float32, whatever the backbone is

    def forward(self, x: Tensor) -> Tensor:
        return x


Layers = Mapping[str, Any]
"""Module path -> PEFT's LoRA layer there (peft does not type their attributes)."""


def inject(transformer: nn.Module, targets: list[str], adapter: Adapter) -> Layers:
    """Let stock PEFT adapt exactly the modules named in `targets`, each with its s, and put Slots into them.

    PEFT creates its matrices on the meta device: nothing is allocated or drawn from the global generator.
    """
    if not targets:
        return {}
    alpha: Any = adapter.lora_alpha  # PEFT declares an int and takes a float
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        use_rslora=adapter.scaling == "rslora",
        rank_pattern=dict(adapter.rank_pattern or {}),
        alpha_pattern=dict(adapter.alpha_pattern or {}),
    )
    with warnings.catch_warnings():  # PEFT sees for itself that GPT-2 stores Wᵀ, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        peft.inject_adapter_in_model(config, transformer, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    layers: dict[str, Any] = {
        name: module for name, module in transformer.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    for layer in layers.values():
        layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER] = _Passing(), Slot(map=reads_maps(layer))
    keep_geometry(layers.values())
    return layers


def keep_geometry(layers: Iterable[Any]) -> None:
    """Let PEFT's layers of convolutions say the geometry of what they adapt: MobileNets pad by what layers say."""
    for layer in filter(reads_maps, layers):
        base = layer.get_base_layer()
        layer.kernel_size, layer.stride, layer.dilation = base.kernel_size, base.stride, base.dilation


def reads_maps(layer: Any) -> bool:
    """Whether one of PEFT's LoRA layers adapts a convolution."""
    return isinstance(layer, peft.tuners.lora.Conv2d)


def transposed(layer: Any) -> bool:
    """Whether one of PEFT's LoRA layers adapts a module that stores Wᵀ."""
    return isinstance(layer, peft.tuners.lora.Linear) and bool(layer.fan_in_fan_out)


@contextmanager
def bound(layers: Layers, updates: Mapping[str, Update]) -> Iterator[None]:
    """Within this context each layer adapts with `updates[name]`, or not at all if it has none."""
    for name, layer in layers.items():
        if layer.disable_adapters != (name not in updates):
            layer.enable_adapters(name in updates)
        if name in updates:
            layer.lora_B[_ADAPTER].update = updates[name]
    try:
        yield
    finally:  # a graph must not outlive its step, nor one client's weights their update
        for name in updates:
            layers[name].lora_B[_ADAPTER].update = None


@contextmanager
def watched(layers: Layers, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context no layer adapts, and `look` is called with each one's name and what it reads, (..., d_in)."""

    def show(name: str, module: nn.Module, args: Any) -> None:
        look(name, args[0].movedim(1, -1) if reads_maps(module) else args[0])

    hooks = [layer.register_forward_pre_hook(partial(show, name)) for name, layer in layers.items()]
    try:
        with bound(layers, {}):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context the module is run by `forward`; afterwards by what ran it before."""
    before = vars(module).get("forward")  # where another library has put its own, as accelerate does
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward  # the class's own shows again
        else:
            module.forward = before
