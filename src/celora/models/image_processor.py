"""What a model makes of an image before it reads it: its mode, size, mean and deviation, as its own processor says."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from celora.errors import ModelError
from celora.models import loading

FILE = "preprocessor_config.json"
"""What `save_pretrained` of a processor writes beside a model."""


class ImageProcessor:
    """A model's own image processor; it is given one image at a time, so that no image depends on its company.

    Args:
        processor: of transformers.
        channels: how many the model reads; 1 makes images grey, 3 makes grey images RGB.
    """

    def __init__(self, processor: Any, channels: int) -> None:
        self._processor, self._channels = processor, channels

    def __call__(self, image: Tensor) -> NDArray[np.float32]:
        """Pixels (channels, height, width) for the model of an image (c, h, w), uint8 or float32 in [0, 1]."""
        whole = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
        pixels = _with_channels(whole, self._channels).numpy()
        made = self._processor(images=pixels, return_tensors="np", input_data_format="channels_first")
        found: NDArray[np.float32] = np.asarray(made["pixel_values"][0], dtype=np.float32)
        return found

    def shape_of(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """What becomes of the shape (channels, height, width) of an image."""
        channels, height, width = self(torch.zeros(shape, dtype=torch.uint8)).shape
        return channels, height, width


def image_processor(source: str, channels: int) -> ImageProcessor | None:
    """The processor in the folder (or in the Hub's local cache) that a backbone came from; None if it brings none.

    Raises:
        ModelError: if it cannot be loaded.
    """
    folder = Path(source)
    found = folder / FILE if folder.is_dir() else try_to_load_from_cache(source, FILE)
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    from transformers import AutoImageProcessor  # noqa: PLC0415  # its import costs what texts need not pay

    loader: Any = AutoImageProcessor  # transformers does not type it
    try:
        with loading.quiet():
            processor = loader.from_pretrained(Path(found).parent, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{found} cannot be read as an image processor: {error}") from error
    return ImageProcessor(processor, channels)


def _with_channels(image: Tensor, channels: int) -> Tensor:
    """The same image (c, h, w) uint8 with so many channels, grey or RGB, as Pillow converts."""
    if len(image) == channels:
        return image
    if len(image) == 1:
        return image.expand(channels, -1, -1)
    grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
    return torch.from_numpy(np.array(grey)).unsqueeze(0)
