"""Activations below the first adapted layer: computed once for each row, kept for all epochs, rounds and clients.

Where only the top layers are adapted, what enters the first of them depends on the row and the frozen backbone alone.
`LowerLayers` captures it there, and replays it: each layer below then returns at once what it once returned, a tensor,
a tuple or whatever its family returns, with these activations in place of its own.

A row gets the same bits on a CPU whatever rows it is computed with, because texts are padded to whole vector registers,
and convolutions are given one image at a time;
so a run that keeps activations equals one that computes them every time, to the last bit. Some architectures are not
like that: tokens come before rows (XLNet), or the tokens of all rows share a product (a mixture of experts). The cache
tries a few rows when it is made; where they disagree, it does without and says so.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from celora.core.learner import Batch
from celora.errors import ModelError
from celora.models.backbone import Backbone
from celora.models.loading import reason
from celora.models.rows import ALONG_TOKENS, count_rows
from celora.models.slots import replaced

_REGISTER = 16
"""Tokens that a text is padded to a multiple of: float32 numbers in the widest vector register."""
_BLOCK = 16 << 20
"""Bytes taken at a time, in memory or in the file."""


class LowerLayers:
    """The layers below the first adapted one, whose work need not be repeated.

    Raises:
        ModelError: if they cannot be replayed to the last bit.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._layers, self._first = backbone.layers[: backbone.depth], backbone.layers[backbone.depth]
        sample, text = backbone.sample(), backbone.kind == "text"
        short = backbone.batch(sample, [0])
        returned, read = self._reached(short)
        leaves, self._structure = pytree.tree_flatten(returned)
        handed = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and any(leaf is one for one in read)]
        if len(handed) != 1:
            raise ModelError(f"{len(handed)} of the tensors that its layers return enter the next one; expected 1")
        self._at, self._leaves = handed[0], [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found = tuple(leaves[self._at].shape)
        tokens = short["input_ids"].shape[1] if text else found[1]
        if found[0] != 1 or (text and found[1:-1] != (tokens,)):
            raise ModelError(f"for 1 row of {tokens} tokens its layers pass on a tensor {found}, not (1, {tokens}, d)")
        together = [0] if backbone.positions else range(len(sample))  # a map's are captured row by row
        batch = self._filled(backbone.batch(sample, together))
        rows = dict(enumerate(self.capture(batch)))
        with self.replayed(padded(rows, len(rows), batch["input_ids"].shape[1] if text else tokens)):
            features = backbone.encode(batch, {})
        equal = torch.equal if backbone.device.type == "cpu" else partial(torch.allclose, rtol=1e-2, atol=1e-2)
        if not equal(features, backbone.encode(batch, {})):
            raise ModelError("features made of them differ from those that all layers make")
        if not all(equal(row, self.capture(backbone.batch(sample, [at]))[0]) for at, row in rows.items()):
            raise ModelError("those of a row depend on the rows beside it")

    @torch.no_grad()
    def capture(self, batch: Batch) -> list[Tensor]:
        """Hidden states (t, d) of each row where it enters the first adapted layer, on the CPU; no padding.

        Those of a map (d, h, w) are made row by row on a CPU, whose convolutions add up otherwise in a larger batch.
        """
        count = count_rows(batch)
        if self._backbone.positions and self._backbone.device.type == "cpu" and count > 1:
            rows = ({name: tensor[at : at + 1] for name, tensor in batch.items()} for at in range(count))
            return [hidden for row in rows for hidden in self.capture(row)]
        returned, _ = self._reached(self._filled(batch))
        hidden = pytree.tree_leaves(returned)[self._at].cpu()
        mask = batch.get("attention_mask")
        lengths = [hidden.shape[1]] * len(hidden) if mask is None else mask.sum(1).tolist()
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    @contextmanager
    def replayed(self, hidden: Tensor) -> Iterator[None]:
        """Within this context these layers compute nothing, and `hidden` (rows, t, d) enters the first adapted one."""
        leaves = list(self._leaves)
        leaves[self._at] = hidden.to(self._backbone.device)
        returned = pytree.tree_unflatten(leaves, self._structure)

        def forward(*_: Any, **__: Any) -> Any:
            return returned

        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(replaced(layer, forward))
            yield

    def _reached(self, batch: Batch) -> tuple[Any, list[Any]]:
        """What the layer just below returns, and all that the first adapted one is called with; no more is computed."""
        returned: Any = None

        def look(module: nn.Module, args: Any, answer: Any) -> None:
            nonlocal returned
            returned = answer

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _ReachedError(pytree.tree_leaves((args, kwargs)))

        hooks = [self._layers[-1].register_forward_hook(look)]
        hooks.append(self._first.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            self._backbone.encode(batch, {})
        except _ReachedError as reached:
            return returned, reached.read
        finally:
            for hook in hooks:
                hook.remove()
        raise ModelError("the first adapted layer is never called")

    def _filled(self, batch: Batch) -> Batch:
        """The batch, its texts padded to a multiple of 16 tokens. Every row's numbers then fill whole registers."""
        if (longest := self._backbone.longest) is None:
            return batch
        tokens = batch["input_ids"].shape[1]
        more = (0, min(-(-tokens // _REGISTER) * _REGISTER, longest) - tokens)
        fillers = {"input_ids": self._backbone.padding}
        return {
            name: F.pad(tensor, more, value=fillers.get(name, 0))
            for name, tensor in batch.items()
            if name in ALONG_TOKENS
        }


class _ReachedError(Exception):
    """The first adapted layer was reached; no more is to be computed."""

    def __init__(self, read: list[Any]) -> None:
        super().__init__()
        self.read = read


def padded(rows: Mapping[int, Tensor], count: int, tokens: int) -> Tensor:
    """(count, tokens, d) of these rows (t, d) at their positions, and 0 everywhere else; maps (d, h, w) likewise."""
    like = next(iter(rows.values()))
    whole = like.new_zeros(count, tokens, *like.shape[1:])
    for at, row in rows.items():
        whole[at, : len(row)] = row
    return whole


class ActivationCache:
    """Activations by row number, in memory up to a budget and beyond it in a memory-mapped file without a name.

    Args:
        backbone: with frozen layers below its first adapted one (`depth > 0`).
        budget: bytes of memory; 0 keeps nothing and computes all activations anew.

    Attributes:
        notices: what the user should know: that this backbone's cannot be kept, or a disk too full to spill to.
    """

    def __init__(self, backbone: Backbone, budget: int) -> None:
        self._backbone, self._budget = backbone, budget
        self._kept: dict[int, Tensor] = {}
        self._block = torch.zeros(0)
        self._left = self._held = 0
        self._full = budget == 0
        self.notices: list[str] = []
        self._below: LowerLayers | None = None
        try:
            self._below = LowerLayers(backbone)
        except Exception as error:  # whatever it is, the run can do without the cache
            why = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {reason(error)}"
            self.notices.append(
                f"activations below the first adapted layer of {backbone.name} are computed anew in every pass: {why}"
            )

    @contextmanager
    def replayed(self, batch: Batch) -> Iterator[None]:
        """Within this context what enters the first adapted layer is this batch's, and no layer below computes it."""
        if self._below is None:
            yield
            return
        with self._below.replayed(self._hidden(self._below, batch)):
            yield

    def _hidden(self, below: LowerLayers, batch: Batch) -> Tensor:
        """Hidden states (rows, t, d) that enter the first adapted layer; 0 where a row is only filling."""
        numbers: list[int] = batch["row"].tolist()
        absent = [at for at, row in enumerate(numbers) if row >= 0 and row not in self._kept]
        fresh: dict[int, Tensor] = {}
        if absent:
            inputs = {name: tensor[torch.as_tensor(absent)] for name, tensor in batch.items()}
            for at, hidden in zip(absent, below.capture(inputs), strict=True):
                fresh[at] = hidden
                self._keep(numbers[at], hidden)
        rows = {at: fresh[at] if at in fresh else self._kept[row] for at, row in enumerate(numbers) if row >= 0}
        mask = batch.get("attention_mask")
        whole = padded(rows, len(numbers), max(map(len, rows.values())) if mask is None else mask.shape[1])
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
                self._block = _mapped(count * width).view(like.dtype)
            except OSError as error:
                self._full = True
                self.notices.append(
                    f"activations are computed anew where they no longer fit: cannot spill {count * width} bytes "
                    f"beyond engine.cache_mb = {self._budget >> 20} ({error.strerror}): free some disk, or raise the "
                    "budget"
                )
                return
        self._left = count


def _mapped(size: int) -> Tensor:
    """Bytes in a file that has no name; its space is taken now, since a full disk kills who writes to a map."""
    with tempfile.TemporaryFile(prefix="celora-activations-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.write(bytes(size))
            file.flush()
        return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)))
