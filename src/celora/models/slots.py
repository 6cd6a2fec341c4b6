"""LoRA matrices that are handed in: stock PEFT layers whose two linear maps hold nothing of their own.

PEFT wraps the target modules and computes `W x + s · lora_B(lora_A(x))`; `lora_A` and `lora_B` are made
`Slot`s. One backbone then serves any number of clients: a turn binds its weights, runs, and unbinds. A weight
`(out, in)` serves one client; `(K, out, in)` serves K clients, whose rows stand one client after another.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_ADAPTER = "default"
_UNBOUND = torch.zeros(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` for one client, or for K clients in one batched product.

    Args:
        x: (rows, ..., in); with a client axis, rows = K · b, client-major.
        weight: (out, in), or (K, out, in).
        bias: (out,), or (K, out), with or without an axis at the weight.

    Returns:
        (rows, ..., out).
    """
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    if weight.dim() == 2 and bias is not None:
        weight = weight.expand(len(bias), -1, -1)
    groups = x.reshape(weight.shape[0], -1, x.shape[-1])
    y = groups @ weight.mT
    if bias is not None:
        y = y + bias.unsqueeze(-2)
    return y.reshape(*x.shape[:-1], weight.shape[1])


class Slot(nn.Module):
    """A linear map whose weight is an ordinary tensor, handed in for one pass."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = _UNBOUND

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., in) -> (rows, ..., out)."""
        return linear(x, self.weight)


Layers = Mapping[str, Any]
"""Module path -> PEFT's LoRA layer there (peft does not type their attributes)."""


def inject(transformer: nn.Module, targets: list[str], rank: int, alpha: Any) -> Layers:
    """Let stock PEFT adapt exactly the linear modules named in `targets`, and put Slots into them.

    PEFT creates its matrices on the meta device: nothing is allocated or drawn from the global generator.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    with warnings.catch_warnings():  # PEFT sees for itself that GPT-2 stores Wᵀ, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        inject_adapter_in_model(config, transformer, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    layers: dict[str, Any] = {
        name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)
    }
    for layer in layers.values():
        layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER] = Slot(), Slot()
    return layers


@contextmanager
def bound(layers: Layers, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within this context each layer adapts with `factors[name] = (A, B)`, or not at all if it has none."""
    for name, layer in layers.items():
        if layer.disable_adapters != (name not in factors):
            layer.enable_adapters(name in factors)
        if name in factors:
            layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight = factors[name]
    try:
        yield
    finally:  # a graph must not outlive its step, nor one client's weights their turn
        for name in factors:
            layers[name].lora_A[_ADAPTER].weight = layers[name].lora_B[_ADAPTER].weight = _UNBOUND
