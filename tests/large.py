"""Tiny Llama, Qwen2, Gemma, GPT-2 and ViT of random weights, and one pass through each with its gradient."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import Tensor

from celora.core.adapters import Lora
from celora.models.backbone import Backbone, load
from celora.models.loading import quiet
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone
from tests import language

TARGETS = {"llama": "q_proj", "qwen2": "q_proj", "gemma": "q_proj", "gpt2": "c_attn", "vit": "q_proj"}
"""Family -> a suffix of its modules."""
LANGUAGE = [family for family in TARGETS if family != "vit"]
VIT = t.ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32,
)  # fmt: skip


def saved(folder: Path) -> Path:
    """All of them, a folder each."""
    for family in LANGUAGE:
        language.saved(folder / family, family)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        t.ViTModel(VIT, add_pooling_layer=False).save_pretrained(folder / "vit")
    return folder


def loaded(folder: Path, family: str, *, layers: str = "all", **settings: Any) -> Backbone:
    """A family's backbone, with its head where it is a language model."""
    of = {"backbone": str(folder / family), "max_length": 32, **settings}
    if "device_map" not in of:
        of.setdefault("device", "cpu")
    adapter = Adapter(targets=(TARGETS[family],), layers=layers, rank=2)
    return load(Model(**of), adapter, Path(), "encoder" if family == "vit" else "causal-lm")


def start(backbone: Backbone, clients: int = 0) -> dict[str, Tensor]:
    """A and B of each adapted module, B not 0; of so many clients, if any are asked for."""
    draw, each = torch.Generator().manual_seed(1), (clients,) if clients else ()
    found: dict[str, Tensor] = {}
    for name, (d_out, d_in) in backbone.targets.items():
        found[f"{name}.A"] = torch.randn(*each, 2, d_in, generator=draw) / d_in**0.5
        found[f"{name}.B"] = 0.3 * torch.randn(*each, d_out, 2, generator=draw)
    return found


def batch(backbone: Backbone) -> dict[str, Tensor]:
    """Four rows of unlike length, or images."""
    if backbone.kind == "image":
        return backbone.batch(
            torch.rand(4, *backbone.image_shape, generator=torch.Generator().manual_seed(0)), range(4)
        )
    return backbone.batch([[5, 9, 20, 31, 7][:count] for count in (3, 5, 4, 5)], range(4))


def stepped(
    backbone: Backbone, weights: dict[str, Tensor], dropout_seed: int | None = None, rate: float = 0.0
) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss of each row, and its sum's gradient with respect to the adapters."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    rows, network = batch(backbone), AdaptedBackbone(backbone, Lora(), rate=rate)
    of = network._encoded(leaves, rows, dropout_seed)
    if backbone.head is None:
        losses = of.features[:, :8].square().sum(1)
    else:
        losses = of.token_losses(rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)).sum(1)
    return losses.detach(), torch.autograd.grad(losses.sum(), list(leaves.values()))
