"""How many tokens a pass has, and how few logits stand at a time, whatever the vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from celora.models import language as heads
from celora.models.backbone import load
from celora.models.capacity import LEAST, fitting, of_layers, on_cpu
from celora.models.settings import Adapter, Model
from tests import language

LLAMA = t.LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
GIB = 1 << 30


def test_on_a_cpu_a_wider_model_has_smaller_passes() -> None:
    assert on_cpu(384) == 1024
    assert on_cpu(192) == 2048
    assert on_cpu(4096) == LEAST


def test_on_cuda_a_pass_takes_half_of_what_is_free() -> None:
    token = 30 * (34 * 576 + 5 * 9 * 512)  # Korthikanti et al., equation 2, 2 bytes a number
    assert of_layers(LLAMA, 512, 2, False) == token
    assert of_layers(LLAMA, 512, 4, False) == 2 * token
    assert fitting(80 * GIB, token) == 40 * GIB // token
    assert fitting(GIB, token) == LEAST


def test_with_checkpointing_one_layer_stands_and_what_enters_the_others() -> None:
    assert of_layers(LLAMA, 512, 2, True) == 34 * 576 + 5 * 9 * 512 + 30 * 576 * 2
    assert of_layers(LLAMA, 512, 2, True) < of_layers(LLAMA, 512, 2, False) / 15


def head(folder: Path, vocabulary: int) -> heads.LanguageHead:
    """Of a tiny model with so many tokens."""
    config = t.LlamaConfig(**{**language.GROUPED, "vocab_size": vocabulary})
    return heads.LanguageHead(t.LlamaForCausalLM(config))


def test_a_larger_vocabulary_has_fewer_tokens_in_a_chunk_and_leaves_less_to_the_pass(tmp_path: Path) -> None:
    small, large = head(tmp_path, 1 << 12), head(tmp_path, 1 << 18)
    assert (small.chunk, large.chunk) == (2048, 32)
    assert small.chunk_bytes == large.chunk_bytes == 4 * 4 * (1 << 23)
    monstrous = head(tmp_path, 1 << 24)
    assert (monstrous.chunk, monstrous.chunk_bytes) == (1, 4 * 4 << 24)
    assert fitting(GIB, 1000, monstrous.chunk_bytes) < fitting(GIB, 1000, small.chunk_bytes) < fitting(GIB, 1000)


def test_logits_stand_for_a_chunk_of_tokens_in_training_and_of_prompts_in_answering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen prompts and sixty targets, where a chunk is four tokens."""
    monkeypatch.setattr(heads, "_LOGITS", 4 * len(language.VOCABULARY))
    adapter = Adapter(targets=("q_proj",), rank=2)
    model = Model(backbone=str(language.saved(tmp_path / "tiny")), device="cpu", max_length=16)
    backbone = load(model, adapter, Path(), "causal-lm")
    assert backbone.head is not None
    shapes, logits = list[Any](), backbone.head.logits

    def watched(states: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(states.shape))
        return logits(states)

    monkeypatch.setattr(backbone.head, "logits", watched)
    prompts = [[2, 7 + at, 8] for at in range(16)]
    together = backbone.answers(prompts, {}, 3)
    batch = backbone.batch([[2, 9, 8, 7] for _ in range(20)], range(20))
    states, _ = backbone.states(batch, {})
    losses = backbone.head.losses(states.requires_grad_(), batch["input_ids"])
    losses.sum().backward()
    assert len(shapes) > 15 and max(count for count, _ in shapes) == 4
    assert together == [backbone.answers([prompt], {}, 3)[0] for prompt in prompts]
    expected = torch.nn.functional.cross_entropy(
        logits(states[:, :-1].flatten(0, 1)), batch["input_ids"][:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(losses[:, 1:].flatten(), expected)
