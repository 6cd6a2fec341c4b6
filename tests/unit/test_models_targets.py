"""celora.models.targets: PEFT's own targets where none are named, and patterns that mean something."""

from pathlib import Path
from typing import Any

import pytest
import transformers as t
from peft import LoraConfig, get_peft_model

from celora.errors import ModelError
from celora.models.backbone import load
from celora.models.settings import Adapter, Model
from celora.models.targets import matching
from tests.facts.test_models import stock

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32
}  # fmt: skip
KNOWN = {
    "bert": (t.BertConfig(**SMALL), {"query", "value"}),
    "roberta": (t.RobertaConfig(**SMALL), {"query", "value"}),
    "deberta-v2": (t.DebertaV2Config(**SMALL), {"query_proj", "value_proj"}),
    "gpt2": (t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32), {"c_attn"}),
    "gpt-neox": (t.GPTNeoXConfig(**SMALL), {"query_key_value"}),
    "llama": (t.LlamaConfig(**SMALL), {"q_proj", "v_proj"}),
    "qwen2": (t.Qwen2Config(**SMALL), {"q_proj", "v_proj"}),
    "phi": (t.PhiConfig(**SMALL), {"q_proj", "v_proj", "fc1", "fc2"}),
    "gemma": (t.GemmaConfig(**SMALL, head_dim=8), {"q_proj", "v_proj"}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_without_targets_an_architecture_is_adapted_where_peft_would(name: str) -> None:
    config, suffixes = KNOWN[name]
    with stock():
        model = t.AutoModel.from_config(config)
        found = matching(model, "auto", name)
        plain: Any = get_peft_model(model, LoraConfig(fan_in_fan_out=name == "gpt2"))
    assert found == plain.base_model.targeted_module_names
    assert {path.rpartition(".")[2] for path in found} == suffixes


def test_of_a_model_that_reads_more_than_texts_its_language_model_is_adapted() -> None:
    text = t.LlamaConfig(**SMALL)
    vision = t.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    with stock():
        model = t.AutoModel.from_config(t.LlavaConfig(text_config=text, vision_config=vision))
    found = matching(model, "auto", "llava")
    assert found == [f"language_model.layers.{at}.self_attn.{of}" for at in range(2) for of in ("q_proj", "v_proj")]


def test_an_architecture_that_peft_does_not_know_is_told_its_linear_modules() -> None:
    with pytest.raises(ModelError) as found:
        load(Model(backbone="random-vit", device="cpu"), Adapter(), Path())
    assert str(found.value) == (
        'adapter.targets = "auto": PEFT has no default targets for the architecture "vit" of random-vit; expected some '
        "of its linear modules: q_proj (2), k_proj (2), v_proj (2), o_proj (2), fc1 (2), fc2 (2)."
    )


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_means_no_adapted_module_is_a_mistake(key: str) -> None:
    adapter = Adapter(**{key: {"layer.0.*": 2, "key": 4}})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf'adapter\.{key}: "key" matches none of the 12 adapted modules of minilm'):
        load(Model(device="cpu"), adapter, Path())
