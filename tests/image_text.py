"""Tiny models of images and texts, of random weights, each saved with what it reads images and texts by."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers as t
from PIL import Image

from celora.models.loading import quiet
from tests.language import VOCABULARY, tokenizer

TEXT: Mapping[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
IMAGE: Mapping[str, Any] = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
DUAL: Mapping[str, Any] = {
    "clip": t.CLIPConfig(text_config=dict(TEXT), vision_config=dict(IMAGE), projection_dim=8),
    "siglip": t.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=dict(IMAGE)),
}


def saved_dual(folder: Path, family: str) -> Path:
    """A dual encoder of this family in a folder, alike in every run."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModel.from_config(DUAL[family])
        for name, weight in model.named_parameters():  # SigLIP draws its scale as if it were any number
            if name.startswith("logit_"):
                weight.data.fill_(-3.0 if name.endswith("bias") else 2.0)
        model.save_pretrained(folder)
        tokenizer(ends=True).save_pretrained(folder)
        processor: Any = t.CLIPImageProcessor if family == "clip" else t.SiglipImageProcessor
        size = {"shortest_edge": 16} if family == "clip" else {"height": 16, "width": 16}
        more = {"crop_size": {"height": 16, "width": 16}} if family == "clip" else {}
        processor(size=size, **more).save_pretrained(folder)
    return folder


SPECIAL = ("<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<global-img>",
           "<fake_token_around_image>", "<end_of_utterance>")  # fmt: skip
WORDS: Mapping[str, Any] = {**TEXT, "vocab_size": len(VOCABULARY) + len(SPECIAL), "max_position_embeddings": 128,
                            "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
SEEING_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _llava(words: Any) -> tuple[Any, Any]:
    vision = t.CLIPVisionConfig(**IMAGE)
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=t.LlamaConfig(**WORDS),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    pixels = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = t.LlavaProcessor(pixels, words, patch_size=8, vision_feature_select_strategy="default",
                                 num_additional_image_tokens=1)  # fmt: skip
    return config, processor


def _paligemma(words: Any) -> tuple[Any, Any]:
    vision = t.SiglipVisionConfig(**IMAGE, projection_dim=16)
    config = t.PaliGemmaConfig(
        vision_config=vision, text_config=t.GemmaConfig(**WORDS), projection_dim=16, hidden_size=16,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = t.SiglipImageProcessor(size={"height": 16, "width": 16})
    pixels.image_seq_length = 4
    return config, t.PaliGemmaProcessor(pixels, words)


def _smolvlm(words: Any) -> tuple[Any, Any]:
    vision = {**IMAGE, "patch_size": 4}
    config = t.SmolVLMConfig(
        vision_config=t.SmolVLMVisionConfig(**vision), text_config=t.LlamaConfig(**WORDS), scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=1,
    )  # fmt: skip
    pixels = t.SmolVLMImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return config, pixels


def _qwen(words: Any, family: str) -> tuple[Any, Any]:
    if family == "qwen2-vl":
        vision: Any = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        kind: Any = t.Qwen2VLConfig
    else:
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
                  "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
        kind = t.Qwen2_5_VLConfig
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
             "vision_end": "<|vision_end|>"}  # fmt: skip
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {key: value for key, value in WORDS.items() if key != "head_dim"}
    config = kind(
        text_config={**text, "rope_parameters": rotary},
        vision_config=vision, **ids,
    )  # fmt: skip
    pixels = t.Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=256, patch_size=4)
    return config, pixels


SEEING = ("llava", "paligemma", "smolvlm", "qwen2-vl", "qwen2.5-vl")


def saved_seeing(folder: Path, family: str) -> Path:
    """A model of images and texts of this family in a folder, with its processor, alike in every run."""
    words = tokenizer()
    words.add_tokens(list(SPECIAL), special_tokens=True)
    makers: Mapping[str, Any] = {"llava": _llava, "paligemma": _paligemma, "smolvlm": _smolvlm}
    config, processor = makers[family](words) if family in makers else _qwen(words, family)
    words.chat_template = SEEING_TEMPLATE.replace(
        "IMAGE", "<|vision_start|><|image_pad|><|vision_end|>" if "qwen" in family else "<image>"
    )
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        t.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def picture(colour: str, noise: np.random.Generator) -> bytes:
    """A PNG file of 16 × 16 pixels about this colour."""
    pixels = np.array(COLOURS[colour]) + noise.integers(-30, 30, (16, 16, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_pictures(path: Path, *, clients: int = 3, each: int = 12) -> None:
    """Pictures of three colours, with label, caption, prompt and client, as Parquet."""
    noise = np.random.default_rng(0)
    rows = []
    for client in range(clients):
        for at in range(each):
            colour = list(COLOURS)[(at + client) % 3]
            rows.append({
                "image": picture(colour, noise), "label": colour, "site": f"site-{client}",
                "text": f"it is {colour}, number {client}", "prompt": "what is it?", "completion": colour,
            })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
