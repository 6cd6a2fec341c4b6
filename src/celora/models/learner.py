"""`ModelLearner`: a client's rows before the shared backbone."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from celora.core.learner import Batch, Metrics, Recipe, Score, Split
from celora.models.batching import BatchedForward, Rows, mini_batches
from celora.models.inputs import ReadyInputs
from celora.rng import generator
from celora.tensors import Tensors


class ModelLearner:
    """A client in one round (`celora.core.learner.Learner`); cheap to make, since everything heavy is shared.

    Args:
        passes: through the backbone, shared by all clients of the process.
        splits: "train", "validation" and "test" rows; a missing split is an empty one.
        initial: every weight at round 0.
        recipe: how to train.
        seed: the run's.
        client, round: with the seed, the address of this learner's draws.

    Raises:
        ModelError: if the backbone cannot read the rows.
    """

    def __init__(
        self,
        passes: BatchedForward,
        splits: Mapping[Split, Rows],
        initial: Tensors,
        recipe: Recipe,
        *,
        seed: int,
        client: str,
        round: int,
    ) -> None:
        backbone = passes.backbone
        for rows in splits.values():
            if len(rows):
                backbone.check(rows.inputs)
        self.initial, self.recipe, self.device = initial, recipe, backbone.device
        self.rng = generator(seed, "algorithm", client, round)
        self._order = generator(seed, "fit", client, round)
        self._dropout = generator(seed, "dropout", client, round) if backbone.dropout else None
        self._passes, self._splits = passes, splits

    @property
    def examples(self) -> int:
        """Number of training rows."""
        return len(self.rows("train"))

    @property
    def shared(self) -> BatchedForward | None:
        """The passes, which clients share; None with dropout, whose masks are drawn for one client's rows."""
        return None if self._dropout else self._passes

    def rows(self, split: Split) -> Rows:
        """The rows of a split."""
        return self._splits.get(split, Rows(ReadyInputs([]), torch.zeros(0, dtype=torch.int64)))

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """`recipe.steps` mini-batches, or those of `recipe.epochs` passes; each call draws another order.

        In a pass the rows are shuffled, sorted by length within windows of 8 batches, cut, and the batches
        shuffled, so that padding to the longest row costs little.
        """
        rows = self.rows("train")
        for chosen in mini_batches(rows.inputs, self.recipe, size, self._order):
            yield self._passes.batch(rows, chosen)

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        """Mean cross entropy: `()`, or `(K,)` where the weights carry a leading client axis."""
        drawn = None
        if self._dropout is not None:
            drawn = int(torch.randint(2**62, (), generator=self._dropout))
        return self._passes.losses(weights, batch, drawn)

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        """`score` (accuracy), `loss` (mean cross entropy) and `rows`; `rows` alone on an empty split."""
        return self._passes.scores([(self, Score(weights, split, rows))])[0]

    def features(self) -> tuple[Tensor, Tensor]:
        """Frozen-backbone features (n, d) of the training rows, pooled, and their labels (n,), on the CPU."""
        return self._passes.features([self])[0]

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        """Module -> ‖X_j‖₂ (d_in,) of its inputs over the first training rows, padding and adapters aside."""
        return self._passes.input_norms(self.rows("train").first(rows))
