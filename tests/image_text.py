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
