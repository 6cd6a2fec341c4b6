"""How many tokens one pass has: what is fastest on a CPU, what fits on CUDA.

Activations take h (34 + 5 a t / h) bytes a token and layer at 2 bytes a number, twice that at 4 (Korthikanti et al.,
MLSys 2023, equation 2; a heads, t tokens a row). With gradient checkpointing they stand for one layer at a time, and
of the others what enters them. Logits stand for a chunk of tokens at a time, whatever the pass; the memory for
that chunk is taken first.
"""

from typing import Any

import numpy as np

_PASS = 1024 * 384
"""Numbers in one hidden state of a pass on a CPU: MiniLM, 384 wide, is fastest at 512 to 1024 tokens."""
LEAST = 512
"""Tokens in a pass, at least."""


def on_cpu(width: int) -> int:
    """Tokens in a pass, by the width of a hidden state."""
    return max(LEAST, _PASS // width)


def fitting(free: int, token: float, chunk: int = 0) -> int:
    """Tokens in a pass that takes at most half of the free memory.

    Args:
        free: bytes.
        token: bytes that a token's activations take.
        chunk: bytes of a chunk of logits, with what is made of them.
    """
    return max(LEAST, int((free / 2 - chunk) / token))


def of_layers(config: Any, longest: int, number: int, checkpointed: bool) -> float:
    """Bytes of activations of one token.

    Args:
        config: the transformer's.
        longest: tokens in a row, at most.
        number: bytes of a number.
        checkpointed: whether layers are computed again going back.
    """
    heads = np.max(config.num_attention_heads)  # Swin has some for each stage
    inner = (34 * config.hidden_size + 5 * heads * longest) * number / 2
    layers: int = config.num_hidden_layers
    return float(inner + layers * config.hidden_size * number if checkpointed else layers * inner)
