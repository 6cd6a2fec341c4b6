"""`ModelLearner`: a client's rows before a network, its own or one that all share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from celora.core.learner import Batch, Metrics, Recipe, Split
from celora.models.batching import BatchedForward
from celora.models.rows import Rows, mini_batches
from celora.rng import generator
from celora.tensors import Tensors


class _Latest:
    """The tensors of the mini-batch that was looked at last, which are let go when another one is."""

    def __init__(self, make: Callable[[Sequence[int]], Batch]) -> None:
        self._make = make
        self._chosen: Sequence[int] | None = None
        self._tensors: Batch = {}

    def of(self, chosen: Sequence[int]) -> Batch:
        """The tensors of these rows; they are the latest as long as it is the same list."""
        if chosen is not self._chosen:
            self._chosen, self._tensors = chosen, self._make(chosen)
        return self._tensors


class _MiniBatch(Batch):
    """Some rows, whose tensors are made when they are looked at: all mini-batches of a `Fit` are listed beforehand."""

    def __init__(self, latest: _Latest, chosen: Sequence[int]) -> None:
        self._latest, self._chosen = latest, chosen

    def __getitem__(self, name: str) -> Tensor:
        return self._latest.of(self._chosen)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._latest.of(self._chosen))

    def __len__(self) -> int:
        return len(self._latest.of(self._chosen))


class ModelLearner:
    """A client in one round (`celora.core.learner.Learner`); cheap to make, since everything heavy is shared.

    Args:
        forward: through the network.
        splits: "train", and "validation" and "test" rows; a missing split is an empty one.
        initial: every weight at round 0.
        recipe: how to train.
        seed: the run's.
        client, round: with the seed, the address of this learner's draws.
    """

    def __init__(
        self,
        forward: BatchedForward,
        splits: Mapping[Split, Rows],
        initial: Tensors,
        recipe: Recipe,
        *,
        seed: int,
        client: str,
        round: int,
    ) -> None:
        self.initial, self.recipe, self.device = initial, recipe, forward.network.device
        self.rng = generator(seed, "algorithm", client, round)
        self._order = generator(seed, "fit", client, round)
        self._dropout = generator(seed, "dropout", client, round) if forward.network.dropout else None
        self._forward, self._splits = forward, splits

    @property
    def examples(self) -> int:
        """Number of training rows."""
        return len(self.rows("train"))

    @property
    def shared(self) -> BatchedForward | None:
        """The passes that clients share; None with dropout, whose masks are drawn for one client's rows."""
        return self._forward if self._forward.network.joins and self._dropout is None else None

    def rows(self, split: Split) -> Rows:
        """The rows of a split."""
        return self._splits[split] if split in self._splits else self._splits["train"].first(0)

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """`recipe.steps` mini-batches, or those of `recipe.epochs` passes; each call draws another order.

        In a pass the rows are shuffled, sorted by length within windows of 8 batches, cut, and the batches
        shuffled, so that padding to the longest row costs little.
        """
        rows = self.rows("train")
        latest = _Latest(partial(self._forward.batch, rows))
        for chosen in mini_batches(len(rows), partial(self._forward.lengths_of, rows), self.recipe, size, self._order):
            yield _MiniBatch(latest, chosen)

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        """Mean loss over what counts: `()`, or `(K,)` where the weights carry a leading client axis."""
        drawn = None
        if self._dropout is not None:
            drawn = int(torch.randint(2**62, (), generator=self._dropout))
        return self._forward.losses(weights, batch, drawn)

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        """As `BatchedForward.scores`."""
        return self._forward.scores([(self, weights, split, rows)])[0]

    def features(self) -> tuple[Tensor, Tensor | None]:
        """As `BatchedForward.features`."""
        return self._forward.features([self])[0]

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        """Module -> ‖X_j‖₂ (d_in,) of its inputs over the first training rows, padding and adapters aside."""
        return self._forward.input_norms(self.rows("train").first(rows))
