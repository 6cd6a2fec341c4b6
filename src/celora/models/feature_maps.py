"""Convolutional backbones, whose last hidden state is a map (rows, channels, h, w): each position is a token.

ConvNeXt, MobileNet and EfficientNet are such. A convolution of 1 × 1 is a linear map at each position, and is adapted
as one (`celora.models.targets`, `celora.models.slots`); all other convolutions stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn

from celora.core.learner import Batch


def as_tokens(states: Tensor) -> Tensor:
    """Hidden states (rows, t, d): the positions of a map (rows, d, h, w) in their order; others are tokens already."""
    return states.flatten(2).mT if states.dim() == 4 else states


def pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that maps each position by itself, as a linear layer does.

    A subclass is none: PEFT makes its factors by calling the module's own class.
    """
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ("same", "valid", (0, 0))
    )


def described(module: nn.Module) -> str:
    """A module in words, for messages: the geometry of a convolution belongs to it."""
    name = type(module).__name__
    if not isinstance(module, nn.Conv2d):
        return name
    kernel, stride = (" × ".join(map(str, size)) for size in (module.kernel_size, module.stride))
    return f"{name} of {kernel}, stride {stride}, {module.groups} group{'' if module.groups == 1 else 's'}"


def patches(config: Any, shape: tuple[int, int, int]) -> int:
    """Into how many patches a transformer cuts an image (channels, height, width)."""
    patch = config.to_dict().get("patch_size") or 16
    down, across = (patch, patch) if isinstance(patch, int) else patch
    _, height, width = shape
    return int((height // down) * (width // across))


@torch.no_grad()
def numbers_put_out(transformer: nn.Module, inputs: Batch) -> int:
    """Numbers that all innermost modules put out in one pass: about what a backward pass keeps."""
    found = 0

    def count(module: nn.Module, args: Any, answer: Any) -> None:
        nonlocal found
        found += answer.numel() if isinstance(answer, Tensor) else 0

    innermost = [module for module in transformer.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in innermost]
    try:
        transformer(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
