"""A client's rows before the backbone: the `Learner` that can train and test on them, and what several learners share.

What is asked of a learner is a problem (`celora.core.problems`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from celora.fields import Count, NonNegative, Positive, setting, settings
from celora.lazy import Tensor, torch
from celora.tensors import Tensors

Metrics = Mapping[str, float]
Batch = Mapping[str, Tensor]
"""One mini-batch; only the learner that made it reads it."""
Split = Literal["train", "validation", "test"]


@settings
class Recipe:
    """Local training: AdamW, its state new at every `Fit` (as in FedPETuning and the published CE-LoRA code)."""

    lr: Positive = setting(1e-3, "learning rate of AdamW")
    epochs: Count = setting(1, "passes over the client's training rows in a round")
    steps: Count | None = setting(None, "mini-batches in a round; given, it replaces `epochs`")
    batch_size: Count = setting(8, "rows in a mini-batch")
    clip: NonNegative = setting(1.0, "largest norm of a gradient; 0 turns clipping off")
    weight_decay: NonNegative = setting(0.0, "decoupled weight decay; note that it pulls C to 0, not to I")
    decay: Literal["none", "linear"] = setting("none", "learning rate within a round: constant, or linear to 0")
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "learning rate of a round: lr, or from it along half a cosine to lr_end in the last round"
    )
    lr_end: NonNegative = setting(0.0, "cosine: learning rate of the last round")

    def __post_init__(self) -> None:
        if self.schedule == "constant" and self.lr_end:
            raise ValueError(f"lr_end: found {self.lr_end:g} with a constant schedule; expected schedule = 'cosine'")
        if self.lr_end > self.lr:
            raise ValueError(f"lr_end: found {self.lr_end:g}, expected at most lr = {self.lr:g}")

    def in_round(self, round: int, rounds: int) -> Recipe:
        """The recipe of a round: lr_end + (lr - lr_end) (1 + cos(pi t / T)) / 2 in round t of T with a cosine.

        Source: stochastic gradient descent with warm restarts (Loshchilov & Hutter, ICLR 2017, equation 5), over rounds
        as FlowerTune has it. A last rate of 0 is kept away from 0 by a millionth of `lr`.
        """
        if self.schedule == "constant":
            return self
        share = (1 + math.cos(math.pi * min(round, rounds) / rounds)) / 2
        return replace(self, lr=max(self.lr_end + (self.lr - self.lr_end) * share, 1e-6 * self.lr))


Losses = Callable[[Tensors], Tensor]
"""Mean losses of one pass under these weights: `()`, or `(K,)` where weights carry a leading client axis."""


class Learner(Protocol):
    """A client's own side of one round: its rows, the shared backbone, and its draws."""

    @property
    def examples(self) -> int:
        """Number of training rows."""

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0, drawn by name from the run's seed: both sides agree on it for 0 bytes."""

    @property
    def recipe(self) -> Recipe:
        """How to train."""

    @property
    def rng(self) -> torch.Generator:
        """For the algorithm's own draws at this client in this round."""

    @property
    def device(self) -> torch.device:
        """Where training happens."""

    @property
    def shared(self) -> Shared | None:
        """What it can share a pass with others through: learners with the same one; None: it runs alone."""

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """The mini-batches of one `Fit`, `recipe` long, in an order drawn from the round's address.

        Args:
            size: rows in each; given, it is one pass over the rows, however long the recipe's is.
        """

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        """Mean loss over what counts in a batch: `()`, or `(K,)` where the weights carry a leading client axis."""

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        """`score` (the task's headline), `loss`, `rows` and the task's other metrics on a split or its first rows.

        An empty split has `rows` alone.
        """

    def features(self) -> tuple[Tensor, Tensor | None]:
        """Frozen-backbone features (n, d) of the training rows, and their class ids (n,) where the task has classes."""

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        """Module -> ‖X_j‖₂ (d_in,) of its inputs X (tokens, d_in) over the first training rows, nothing adapted."""


class Shared(Protocol):
    """What several learners have in common, and what it can do for all of them in one pass."""

    @property
    def capacity(self) -> int:
        """Tokens (or whatever `size` counts) of the largest pass that is worth it, or fits into memory."""

    def count(self, batch: Batch) -> int:
        """What the mean loss of one client's mini-batch is over: rows, or target tokens."""

    def size(self, batch: Batch) -> tuple[int, int]:
        """(rows, tokens of the longest row) of a mini-batch: in a pass every row is filled up to the longest."""

    def cut(self, batch: Batch) -> Sequence[Batch]:
        """The mini-batch whole, or its rows one by one where filling them up to the longest would cost much."""

    def join(self, batches: Sequence[Batch]) -> Batch:
        """Mini-batches of K clients as one, client-major, for weights with a leading client axis."""

    def scores(self, asked: Sequence[tuple[Learner, Tensors, Split, int | None]]) -> list[Metrics]:
        """`Learner.test(weights, split, rows)` of each (learner, weights, split, rows)."""

    def features(self, learners: Sequence[Learner]) -> list[tuple[Tensor, Tensor | None]]:
        """`Learner.features` of each."""
