"""`ModelLearner`: a client's rows before the shared backbone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.core.learner import Batch, Metrics, Recipe, Split
from celora.models.backbone import Backbone, Inputs
from celora.models.families import factors
from celora.models.slots import linear
from celora.rng import generator
from celora.tensors import Tensors

_WINDOW = 8
"""Batches among which rows are sorted by length: enough to bucket well, few enough to stay shuffled."""
_TOKENS = 1024
"""Tokens in one inference pass: on a CPU, MiniLM is fastest at 512 to 1024 and loses a third at 8192."""
_IMAGES = 256
"""Images in one inference pass."""
_ABSENT = -100
"""The label of a row that only fills up a batch; cross entropy ignores it."""


@dataclass(frozen=True)
class Rows:
    """One split of a client: token id lists or images (n, channels, h, w), and class ids (n,) int64."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class ModelLearner:
    """A client in one round (`celora.core.learner.Learner`); cheap to make, since everything heavy is shared.

    Args:
        backbone: shared by all clients of the process.
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
        backbone: Backbone,
        splits: Mapping[Split, Rows],
        initial: Tensors,
        recipe: Recipe,
        *,
        seed: int,
        client: str,
        round: int,
    ) -> None:
        for rows in splits.values():
            if len(rows):
                backbone.check(rows.inputs)
        self.initial, self.recipe, self.device = initial, recipe, backbone.device
        self.rng = generator(seed, "algorithm", client, round)
        self._order = generator(seed, "fit", client, round)
        self._dropout = generator(seed, "dropout", client, round) if backbone.dropout else None
        self._backbone, self._splits = backbone, splits

    @property
    def examples(self) -> int:
        """Number of training rows."""
        return len(self._rows("train"))

    def _rows(self, split: Split) -> Rows:
        return self._splits.get(split, Rows([], torch.zeros(0, dtype=torch.int64)))

    def batches(self) -> Iterator[Batch]:
        """`recipe.steps` mini-batches, or those of `recipe.epochs` passes; each call draws another order.

        In a pass the rows are shuffled, sorted by length within windows of 8 batches, cut, and the batches
        shuffled, so that padding to the longest row costs little.
        """
        rows = self._rows("train")
        left = self.recipe.steps
        for _ in range(self.recipe.epochs) if left is None else iter(int, 1):
            if not len(rows):
                return
            for chosen in bucketed(lengths(rows.inputs), self.recipe.batch_size, self._order):
                if left == 0:
                    return
                left = None if left is None else left - 1
                labels = rows.labels[torch.as_tensor(chosen)].to(self.device)
                yield {**self._backbone.batch(rows.inputs, chosen), "labels": labels}

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        """Mean cross entropy: `()`, or `(K,)` where the weights carry a leading client axis."""
        drawn = None
        if self._dropout is not None:
            drawn = int(torch.randint(2**62, (), generator=self._dropout))
        scores, labels = logits(self._backbone, weights, batch, drawn), batch["labels"]
        clients = _clients(weights)
        if clients is None:
            return F.cross_entropy(scores, labels)
        each = F.cross_entropy(scores, labels, reduction="none", ignore_index=_ABSENT).view(clients, -1)
        return each.sum(1) / (labels.view(clients, -1) != _ABSENT).sum(1)

    def test(self, weights: Tensors, split: Split) -> Metrics:
        """`score` (accuracy), `loss` (mean cross entropy) and `rows`; `rows` alone on an empty split."""
        rows = self._rows(split)
        if not len(rows):
            return {"rows": 0.0}
        scores = predict(self._backbone, {**self.initial, **weights}, rows.inputs)
        return {
            "score": (scores.argmax(1) == rows.labels).float().mean().item(),
            "loss": F.cross_entropy(scores, rows.labels).item(),
            "rows": float(len(rows)),
        }

    def features(self) -> tuple[Tensor, Tensor]:
        """Frozen-backbone features (n, d) of the training rows, pooled, and their labels (n,), on the CPU."""
        rows = self._rows("train")
        return encode(self._backbone, {}, rows.inputs), rows.labels


def logits(backbone: Backbone, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
    """(rows, classes) of a batch; where weights carry a leading client axis, its rows are client-major."""
    features = backbone.encode(batch, factors(weights), dropout_seed)
    return linear(features, weights["head.weight"], weights["head.bias"])


def encode(backbone: Backbone, weights: Tensors, inputs: Inputs) -> Tensor:
    """Pooled features (n, d) of all rows in order, on the CPU; without weights, of the frozen backbone."""
    found = torch.zeros(len(inputs), backbone.width)  # made outside, or autograd would refuse it for ever
    with torch.inference_mode():
        slots = factors({name: weight.to(backbone.device) for name, weight in weights.items()})
        for rows in budgeted(lengths(inputs)):
            found[torch.as_tensor(rows)] = backbone.encode(backbone.batch(inputs, rows), slots).cpu()
    return found


@torch.no_grad()
def predict(backbone: Backbone, weights: Tensors, inputs: Inputs) -> Tensor:
    """Logits (n, classes) of all rows in their order, on the CPU, for one client's weights."""
    features = encode(backbone, weights, inputs)
    return linear(features, weights["head.weight"].cpu(), weights["head.bias"].cpu())


def lengths(inputs: Inputs) -> list[int]:
    """Tokens in each row; images are all alike."""
    return [_TOKENS // _IMAGES] * len(inputs) if isinstance(inputs, Tensor) else [len(row) for row in inputs]


def bucketed(sizes: Sequence[int], batch_size: int, order: torch.Generator) -> list[list[int]]:
    """One pass over all rows, as shuffled batches of rows of like length; one batch may be smaller."""
    shuffled: list[int] = torch.randperm(len(sizes), generator=order).tolist()
    window = _WINDOW * batch_size
    found: list[list[int]] = []
    for start in range(0, len(shuffled), window):
        rows = sorted(shuffled[start : start + window], key=sizes.__getitem__)
        found += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [found[at] for at in torch.randperm(len(found), generator=order).tolist()]


def budgeted(sizes: Sequence[int]) -> Iterator[list[int]]:
    """All rows sorted by length, in batches whose padded size stays within the token budget."""
    batch: list[int] = []
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and sizes[row] * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def join(batches: Sequence[Batch]) -> Batch:
    """The mini-batches of K clients as one, client-major, for weights with a leading client axis.

    Texts are padded to the longest row of all, and each client to the most rows of any; the loss ignores the
    filling.
    """
    most = max(len(batch["labels"]) for batch in batches)
    joined: dict[str, Tensor] = {}
    for name in batches[0]:
        shape = [max(sizes) for sizes in zip(*(batch[name].shape[1:] for batch in batches), strict=True)]
        filling = _ABSENT if name == "labels" else 0
        whole = batches[0][name].new_full((len(batches), most, *shape), filling)
        if name == "attention_mask":
            whole[..., 0] = 1  # a row without any token would have no softmax
        for target, batch in zip(whole, batches, strict=True):
            target[tuple(slice(size) for size in batch[name].shape)] = batch[name]
        joined[name] = whole.flatten(0, 1)
    return joined


def _clients(weights: Tensors) -> int | None:
    """K, if any weight carries a leading client axis (all matrices have two axes, the head's bias one)."""
    for name, weight in weights.items():
        if weight.dim() > (1 if name == "head.bias" else 2):
            return weight.shape[0]
    return None
