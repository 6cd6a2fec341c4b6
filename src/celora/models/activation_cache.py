"""Activations below the first adapted layer: computed once for each row, kept for all epochs, rounds and clients.

Where only the top layers are adapted, what enters the first of them depends on the row and the frozen backbone alone.
Rows of any company give the same bits on a CPU, because `Backbone.prefix` pads them to whole vector registers; so a
run that keeps them equals one that computes them every time, to the last bit.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from celora.core.learner import Batch
from celora.models.backbone import Backbone

_BLOCK = 16 << 20
"""Bytes taken at a time, in memory or in the file."""


class ActivationCache:
    """A cache of prefixes by row number, in memory up to a budget and beyond it in a memory-mapped file.

    Args:
        backbone: with frozen layers below its first adapted one (`depth > 0`).
        budget: bytes of memory; 0 keeps nothing and computes every prefix anew.
        folder: where the file goes (it has no name there and vanishes with the process); None: the system's own.

    Attributes:
        spilled: bytes in the file.
        notices: what the user should know, such as a disk too full to spill to.
    """

    def __init__(self, backbone: Backbone, budget: int, folder: Path | None = None) -> None:
        self._backbone, self._budget, self._folder = backbone, budget, folder
        self._kept: dict[int, Tensor] = {}
        self._block = torch.zeros(0)
        self._left = self._held = self.spilled = 0
        self._full = budget == 0
        self.notices: list[str] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states (rows, t, d) that enter the first adapted layer; 0 where a row is only filling."""
        numbers: list[int] = batch["row"].tolist()
        absent = [at for at, row in enumerate(numbers) if row >= 0 and row not in self._kept]
        fresh: dict[int, Tensor] = {}
        if absent:
            inputs = {name: tensor[torch.as_tensor(absent)] for name, tensor in batch.items()}
            for at, hidden in zip(absent, self._backbone.prefix(inputs), strict=True):
                fresh[at] = hidden
                self._keep(numbers[at], hidden)
        rows = {at: fresh[at] if at in fresh else self._kept[row] for at, row in enumerate(numbers) if row >= 0}
        mask = batch.get("attention_mask")
        longest = max(map(len, rows.values())) if mask is None else mask.shape[1]
        like = next(iter(rows.values()))
        whole = like.new_zeros(len(numbers), longest, like.shape[-1])
        for at, hidden in rows.items():
            whole[at, : len(hidden)] = hidden
        device = self._backbone.device
        return whole.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else whole

    def _keep(self, row: int, hidden: Tensor) -> None:
        """A copy of a row's hidden states (t, d), if there is room for it anywhere."""
        size = hidden.numel()
        if size > self._left:
            self._next_block(hidden)
        if not self._full:
            start = len(self._block) - self._left
            self._left -= size
            self._kept[row] = self._block[start : start + size].copy_(hidden.reshape(-1)).view_as(hidden)

    def _next_block(self, like: Tensor) -> None:
        """Room for at least this row: memory while the budget lasts, then the file, then nothing."""
        width = like.element_size()
        count = max(_BLOCK // width, like.numel())
        if self._full:
            return
        if self._held + count * width <= self._budget:
            self._block = torch.empty(count, dtype=like.dtype)
            self._held += count * width
        else:
            try:
                self._block = _mapped(count * width, self._folder).view(like.dtype)
                self.spilled += count * width
            except OSError as error:
                self._full = True
                self.notices.append(
                    f"prefixes are computed anew where they no longer fit: cannot spill {count * width} bytes beyond "
                    f"engine.cache_mb = {self._budget >> 20} ({error.strerror}): free some disk, or raise the budget"
                )
                return
        self._left = count


def _mapped(size: int, folder: Path | None) -> Tensor:
    """Bytes in a file that has no name; its space is taken now, since a full disk kills who writes to a map."""
    with tempfile.TemporaryFile(dir=folder, prefix="celora-prefixes-") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)))
