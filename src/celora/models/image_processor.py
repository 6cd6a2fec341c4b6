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
from celora.models import efficientnet_lite, loading

FILE = "preprocessor_config.json"
"""What `save_pretrained` of an image processor writes beside a model."""
_WHOLE = "processor_config.json"
"""What that of a processor of images and texts writes."""


class ImageProcessor:
    """A model's own image processor; it is given one image at a time, so that no image depends on its company.

    Args:
        processor: of transformers.
        channels: how many the model reads; 1 makes images grey, 3 makes grey images RGB.
        side: pixels of a side that images are resized to, instead of what the processor itself makes of them.
    """

    def __init__(self, processor: Any, channels: int, side: int | None = None) -> None:
        self._processor, self._channels = processor, channels
        self._size = {} if side is None else {"size": {"height": side, "width": side}, "do_center_crop": False}

    def __call__(self, image: Tensor) -> NDArray[np.float32]:
        """Pixels (channels, height, width) for the model of an image (c, h, w), uint8 or float32 in [0, 1]."""
        whole = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
        pixels = _with_channels(whole, self._channels).numpy()
        made = self._processor(images=pixels, return_tensors="np", input_data_format="channels_first", **self._size)
        found: NDArray[np.float32] = np.asarray(made["pixel_values"][0], dtype=np.float32)
        return found

    def save(self, folder: Path) -> None:
        """Write it as `AutoImageProcessor` reads it, with the size that it makes."""
        type(self._processor).from_dict({**self._processor.to_dict(), **self._size}).save_pretrained(folder)

    def shape_of(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """What becomes of the shape (channels, height, width) of an image."""
        channels, height, width = self(torch.zeros(shape, dtype=torch.uint8)).shape
        return channels, height, width


def image_processor(source: str, channels: int, side: int | None = None) -> ImageProcessor | None:
    """The processor in the folder (or in the Hub's local cache) that a backbone came from; None if it brings none.

    Raises:
        ModelError: if it cannot be loaded, or makes no images of `side` pixels a side.
    """
    if source == efficientnet_lite.NAME:
        return ImageProcessor(efficientnet_lite.processor(), channels, side)
    folder = Path(source)
    places = [folder / name if folder.is_dir() else try_to_load_from_cache(source, name) for name in (FILE, _WHOLE)]
    found = next((place for place in places if isinstance(place, str | Path) and Path(place).is_file()), None)
    if found is None:
        if side is not None:
            raise ModelError(f"model.image_size = {side}, but {source} brings no image processor ({FILE}): drop it")
        return None
    from transformers import AutoImageProcessor  # noqa: PLC0415  # its import costs what texts need not pay

    loader: Any = AutoImageProcessor  # transformers does not type it
    try:
        with loading.quiet():
            processor = loader.from_pretrained(Path(found).parent, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{found} cannot be read as an image processor: {error}") from error
    made = ImageProcessor(processor, channels, side)
    try:
        made.shape_of((channels, 64, 64))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if side is None:
            raise
        what = type(processor).__name__
        raise ModelError(
            f"model.image_size = {side}: {what} makes no squares ({loading.reason(error)}): drop it"
        ) from error
    return made


def _with_channels(image: Tensor, channels: int) -> Tensor:
    """The same image (c, h, w) uint8 with so many channels, grey or RGB, as Pillow converts."""
    if len(image) == channels:
        return image
    if len(image) == 1:
        return image.expand(channels, -1, -1)
    grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
    return torch.from_numpy(np.array(grey)).unsqueeze(0)
