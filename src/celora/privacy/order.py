"""An order-preserving code: numbers a server may compare and cannot read.

    x in 0 … size − 1   ->   Σ_{i ≤ x} g_i,   g_i from 1 to 2⁴⁰, drawn by the clients' secret

What it leaks is the order, by design, and with it more: the gaps are alike, so that code / largest code is about
x / size, the closer the more numbers there are (a test in tests/facts measures it). Equal numbers have equal codes.
"""

import hashlib

from celora.lazy import Tensor, np, torch
from celora.privacy.keys import derived


class Code:
    """The strictly increasing map of one purpose.

    Args:
        secret: of the clients.
        purpose: codes for two purposes are unrelated.
        size: how many numbers there are, at most 2²².

    Raises:
        ValueError: if there are more.
    """

    def __init__(self, secret: bytes, purpose: str, size: int) -> None:
        if not 0 < size <= 1 << 22:
            raise ValueError(f"found a code of {size} numbers, expected 1 to {1 << 22}")
        stream = hashlib.shake_256(derived(secret, f"order {purpose}")).digest(8 * size)
        gaps = (np.frombuffer(stream, dtype="<u8") >> np.uint64(24)).astype(np.int64) + 1
        self._codes = torch.from_numpy(gaps.cumsum())

    def encode(self, numbers: Tensor) -> Tensor:
        """Codes, int64, of numbers from 0 to size − 1."""
        return self._codes[numbers]

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers, int64.

        Raises:
            ValueError: if one of them is nobody's code.
        """
        found = torch.searchsorted(self._codes, codes).clamp(max=len(self._codes) - 1)
        if not torch.equal(self._codes[found], codes):
            raise ValueError("found a number that is no code: made with another key, or not by a client")
        return found
