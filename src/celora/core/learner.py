"""The client's side of a local training problem: what a turn may ask for, and the `Learner` that can do it.

A client's turn is a generator of problems: `fitted = yield Fit(weights, train=...)` hands one to whoever runs the
client (`celora.core.solve`), which trains it alone or together with others; no turn can tell which.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from celora.fields import Count, NonNegative, Positive, setting, settings
from celora.tensors import Names, Tensors

T = TypeVar("T")

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


Losses = Callable[[Tensors], Tensor]
"""Mean losses of one pass under these weights: `()`, or `(K,)` where weights carry a leading client axis."""


@dataclass(frozen=True)
class Fit:
    """A local training problem.

    Attributes:
        weights: where to start; names that are missing take the learner's `initial` value.
        train: the names that are trained, the others stay as they are.
        penalty: added to the loss of every batch, from the weights being trained to a scalar (shape `()`).
        objective: what is minimised instead of `losses(weights)`, made of losses under weights that may differ: for
            models in two parts. It must be the same for all clients: a method, not a closure over a client's state.
    """

    weights: Tensors
    train: Names
    penalty: Callable[[Tensors], Tensor] | None = None
    objective: Callable[[Losses, Tensors], Tensor] | None = None


@dataclass(frozen=True)
class Fitted:
    """A solved `Fit`: all weights on the CPU, the trained ones new and detached; `metrics` holds loss and steps."""

    weights: dict[str, Tensor]
    metrics: Metrics


@dataclass(frozen=True)
class Gradient:
    """The gradient of a mini-batch's mean loss: for methods whose local step is no `Fit`.

    Attributes:
        weights: where; names that are missing take the learner's `initial` value.
        batch: one of `Learner.batches()`.
        names: with respect to which weights.
        along: given, the gradient of ⟨∇ loss, along⟩ instead, ∇ being with respect to the names in `along`: a (mixed)
            second derivative times a vector.
    """

    weights: Tensors
    batch: "Batch"
    names: Names
    along: Tensors | None = None


@dataclass(frozen=True)
class GradientResult:
    """A solved `Gradient`: the loss (before any clipping, penalty or decay), and the gradient on the CPU."""

    loss: float
    gradient: dict[str, Tensor]


@dataclass(frozen=True)
class Score:
    """The metrics of these weights on a split, as `Learner.test` gives them; of its first `rows` rows, if given."""

    weights: Tensors
    split: Split
    rows: int | None = None


@dataclass(frozen=True)
class Features:
    """The frozen backbone's features of the training rows, as `Learner.features` gives them."""


@dataclass(frozen=True)
class InputNorms:
    """The norm of every input channel of every adapted module, as `Learner.channels` gives them."""

    rows: int


Problem = Fit | Gradient | Score | Features | InputNorms
ClientUpdate = Generator[Problem, Any, T]
"""The generator of a local update. A `Fit` is answered with `Fitted`, a `Gradient` with `GradientResult`, a `Score`
with `Metrics`, `Features` with two tensors, `InputNorms` with a tensor for each module."""


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
    def shared(self) -> "Shared | None":
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

    def scores(self, asked: Sequence[tuple[Learner, Score]]) -> list[Metrics]:
        """`Learner.test` of each."""

    def features(self, learners: Sequence[Learner]) -> list[tuple[Tensor, Tensor | None]]:
        """`Learner.features` of each."""
