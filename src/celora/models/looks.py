"""How families of transformers see: what becomes of an image and a text (`celora.models.seeing.Look`).

Most say it by their processor. Those of Qwen-VL and SmolVLM read films, too, and cannot be loaded where torchvision is
missing; there the image processor and the tokenizer do, which is all that an image needs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from celora.errors import ModelError
from celora.lazy import Lazy
from celora.models import loading
from celora.models.row_reader import NO_IMAGES
from celora.models.seeing import Look, Picture

transformers, smolvlm = Lazy("transformers"), Lazy("transformers.models.smolvlm.processing_smolvlm")


def look_of(source: str, tokenizer: Any, config: Any, name: str) -> tuple[Look, Any]:
    """How a model sees, and what writes its messages.

    Args:
        source: its folder, or its Hub id in the local cache.
        name: for messages.

    Raises:
        ModelError: if it brings no processor of images.
    """
    local = {"local_files_only": True, "trust_remote_code": False}
    made: Any
    try:
        with loading.quiet():
            match config.model_type:
                case "qwen2_vl" | "qwen2_5_vl":
                    made = transformers.AutoImageProcessor.from_pretrained(source, **local)
                    return _by_grid(made, tokenizer, config), tokenizer
                case "smolvlm" | "idefics3":
                    made = transformers.AutoImageProcessor.from_pretrained(source, **local)
                    return _by_tiles(made, tokenizer, config), tokenizer
                case _:
                    made = transformers.AutoProcessor.from_pretrained(source, **local)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{source} brings no processor of images and texts: {loading.reason(error)}") from error
    if not isinstance(made, transformers.ProcessorMixin):
        raise ModelError(NO_IMAGES.format(f"{name}, a {config.model_type},"))
    return _by_processor(made), made if made.chat_template is not None else tokenizer


def _shown(image: Tensor) -> Image.Image:
    pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _placed(text: str, mark: str, expanded: Callable[[], str], frame: str = "{}") -> str:
    """The text with all places of its image, before which it stands where it has no mark."""
    return _marked(text, mark, frame).replace(mark, expanded())


def _marked(text: str, mark: str, frame: str = "{}") -> str:
    """The text with the mark of its image, before which it stands where it has none.

    Raises:
        ValueError: if it has several.
    """
    if (count := text.count(mark)) > 1:
        raise ValueError(f"found {count} marks {mark!r} in its text, expected one at most, as it has one image")
    return text if count else frame.format(mark) + text


def _by_processor(processor: Any) -> Look:
    def look(image: Tensor, text: str) -> Picture:
        whole = _marked(text, processor.image_token)
        made = processor(text=[whole], images=[_shown(image)], return_tensors="np")
        return Picture({name: np.asarray(x)[0] for name, x in made.items() if name not in ("attention_mask", "labels")})

    return look


def _by_grid(images: Any, tokenizer: Any, config: Any) -> Look:
    """Qwen-VL: an image is a grid of patches, of which a square becomes one token."""
    mark = tokenizer.convert_ids_to_tokens(config.image_token_id)
    frame = "{}".join(map(tokenizer.convert_ids_to_tokens, (config.vision_start_token_id, config.vision_end_token_id)))

    def look(image: Tensor, text: str) -> Picture:
        made = images(images=[_shown(image)], return_tensors="np")
        count = int(made["image_grid_thw"].prod()) // images.merge_size**2
        ids = np.asarray(tokenizer(_placed(text, mark, lambda: mark * count, frame))["input_ids"])
        seen = (ids == config.image_token_id).astype(np.int64)
        return Picture(
            input_ids=ids, mm_token_type_ids=seen, pixel_values=np.asarray(made["pixel_values"]),
            image_grid_thw=np.asarray(made["image_grid_thw"])[0],
        )  # fmt: skip

    return look


def _by_tiles(images: Any, tokenizer: Any, config: Any) -> Look:
    """SmolVLM: an image is one tile, or several in rows and columns and the whole of it."""
    mark = tokenizer.convert_ids_to_tokens(config.image_token_id)
    count = (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
    marks = {"fake_token_around_image": "<fake_token_around_image>", "global_image_token": "<global-img>"}

    def look(image: Tensor, text: str) -> Picture:
        made = images(images=[[_shown(image)]], return_tensors="np", return_row_col_info=True)
        rows, columns = made["rows"][0][0], made["cols"][0][0]
        places: str = smolvlm.get_image_prompt_string(rows, columns, count, image_token=mark, **marks)
        ids = np.asarray(tokenizer(_placed(text, mark, lambda: places))["input_ids"])
        others = {name: np.asarray(made[name])[0] for name in ("pixel_values", "pixel_attention_mask")}
        return Picture(input_ids=ids, **others)

    return look
