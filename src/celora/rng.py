"""Every random draw has an address.

`generator(seed, "fit", client, round)` is the same stream today, after a resume, on another engine and in any
order of arrival; two different addresses give unrelated streams. There are no global seeds.

>>> import torch
>>> draw = lambda *address: torch.rand(1, generator=generator(*address)).item()
>>> draw(0, "fit", "site-a", 3) == draw(0, "fit", "site-a", 3)
True
>>> draw(0, "fit", "site-a", 3) == draw(0, "fit", "site-a", 4)
False
"""

from __future__ import annotations

import hashlib
import json

from celora.lazy import np, torch

Address = str | int


def _digest(seed: int, *address: Address) -> int:
    """63 bits of SHA-256 over the JSON of the address: `("a", 1)` and `("a1",)` are not the same place."""
    text = json.dumps([seed, *address], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *address: Address) -> torch.Generator:
    """A CPU generator for the draws at this address."""
    return torch.Generator().manual_seed(_digest(seed, *address))


def numpy_generator(seed: int, *address: Address) -> np.random.Generator:
    """The same for code that draws with numpy."""
    return np.random.default_rng(_digest(seed, *address))
