"""A tiny Llama of random weights in a real GGUF file."""

from pathlib import Path

import numpy as np
import pytest

from celora.models.gguf import INSTALL


def write_tiny(path: Path) -> None:
    """Two layers of 64 numbers, its matrices in Q4_1."""
    gguf = pytest.importorskip("gguf", reason=f"needs gguf: {INSTALL}")
    drawn = np.random.default_rng(0)
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", *letters, "Ġt", "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), 64)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (64, 64) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (32, 64) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{block}.{name}": (96, 64) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (64, 96)}
    for name, shape in shapes.items():
        matrix = drawn.normal(0, 0.1, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{block}.{norm}" for block in range(2) for norm in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
