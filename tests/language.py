"""Tiny language models of random weights, each with a tokenizer of characters and a chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from celora.models.loading import quiet

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:?!#0123456789\nABDEIRW'"
VOCABULARY = ["<unk>", "<pad>", "<s>", "</s>", "<user>", "<assistant>", "<end>", *CHARACTERS]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMMON: Mapping[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES: Mapping[str, tuple[Any, str]] = {
    "llama": (t.LlamaConfig(**GROUPED), "q_proj"),
    "qwen2": (t.Qwen2Config(**{**COMMON, "num_key_value_heads": 1}, tie_word_embeddings=True), "q_proj"),
    "gemma": (t.GemmaConfig(**GROUPED), "q_proj"),
    "gemma2": (t.Gemma2Config(**GROUPED, final_logit_softcapping=3.0, query_pre_attn_scalar=8), "q_proj"),
    "granite": (t.GraniteConfig(**{**COMMON, "num_key_value_heads": 1}, logits_scaling=4.0), "q_proj"),
    "gpt2": (
        t.GPT2Config(
            vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=256, bos_token_id=2, eos_token_id=3,
            initializer_range=0.2,
        ),
        "c_attn",
    ),
    "opt": (
        t.OPTConfig(
            vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
            max_position_embeddings=256, word_embed_proj_dim=8, do_layer_norm_before=False, pad_token_id=1,
            bos_token_id=2, eos_token_id=3, init_std=0.2,
        ),
        "q_proj",
    ),
    "gpt-neox": (t.GPTNeoXConfig(**COMMON), "query_key_value"),
}  # fmt: skip
"""Name -> configuration, and a suffix of module names that are adapted."""


def tokenizer(*, begins: bool = False, ends: bool = False) -> Any:
    """A token for each character; `begins`: with `<s>` before every text; `ends`: and `</s>` after it."""
    inner = Tokenizer(WordLevel({word: at for at, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    inner.decoder = Fuse()
    if begins:
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    if ends:
        special = [("<s>", 2), ("</s>", 3)]
        inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    found = t.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def saved(folder: Path, family: str = "llama", *, begins: bool = False) -> Path:
    """A language model of this family in a folder, alike in every run."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        t.AutoModelForCausalLM.from_config(FAMILIES[family][0]).save_pretrained(folder)
        tokenizer(begins=begins).save_pretrained(folder)
    return folder
