"""What becomes of a backbone's weights as they are loaded: their dtype, their bits, and where they lie."""

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from celora.errors import ModelError
from celora.lazy import Lazy
from celora.models.settings import Model

if TYPE_CHECKING:
    import transformers
else:
    transformers = Lazy("transformers")
bitsandbytes = Lazy("bitsandbytes")

INSTALL = "pip install --no-deps bitsandbytes==0.50.2"
"""What bitsandbytes needs (torch, numpy, packaging) comes with celora."""


def dtype_of(model: Model) -> torch.dtype:
    """Of the frozen weights that are no packed bits."""
    return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32


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


def options(model: Model) -> dict[str, Any]:
    """What `from_pretrained` is told beside the folder.

    Raises:
        ModelError: if a package or a device is missing.
    """
    told: dict[str, Any] = {"dtype": dtype_of(model)}
    if model.quantise is not None:
        told |= {"quantization_config": _bits(model), "device_map": {"": str(device_of(model.device))}}
    if model.device_map is not None:
        told["device_map"] = model.device_map if isinstance(model.device_map, str) else dict(model.device_map)
    return told


def first_device(transformer: nn.Module, model: Model) -> torch.device:
    """Where rows enter: `model.device`, or where the first of the weights lies that accelerate has put on a device."""
    if model.device_map is None:
        return device_of(model.device)
    placed = (weight.device for weight in transformer.parameters() if not weight.is_meta)
    return next(placed, torch.device("cpu"))


def _bits(model: Model) -> Any:
    """How bitsandbytes packs linear layers: NF4 with packed scales (QLoRA), or LLM.int8."""
    what = f'model.quantise = "{model.quantise}"'
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"{what} needs the package bitsandbytes, which is not installed: {INSTALL}")
    device = torch.device(device_of(model.device))
    able = sorted(set(bitsandbytes.supported_torch_devices) - {"npu"})
    if device.type not in able:
        raise ModelError(f'{what} on the device "{device}": bitsandbytes knows {", ".join(able)}; drop model.quantise')
    # on CUDA it logs at every call that it casts what an 8-bit layer reads
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config: Any = transformers.BitsAndBytesConfig  # transformers does not type it
    if model.quantise == "8bit":
        return config(load_in_8bit=True)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(model),
    )
