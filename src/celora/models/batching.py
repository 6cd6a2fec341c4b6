"""Forward passes through one backbone, for one client or for many: which rows go together, and what comes out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.core.adapters import Family, linear, modules
from celora.core.learner import Batch, Metrics, Recipe, Score
from celora.core.training import FILLING, passes
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone
from celora.models.inputs import Inputs, JoinedInputs, inputs_of
from celora.tensors import Tensors, common

_WINDOW = 8
"""Batches among which rows are sorted by length: enough to bucket well, few enough to stay shuffled."""
_ABSENT = -100
"""The label of a row that only fills up a batch; cross entropy ignores it."""
_FILLING = {"labels": _ABSENT, "row": -1}


@dataclass(frozen=True)
class Rows:
    """One split of a client.

    Attributes:
        inputs: what a model reads; token id lists and images (n, channels, h, w) are wrapped.
        labels: class ids (n,) int64.
        numbers: the row's number (n,) int64 in the table that `ActivationCache` caches; None if there is no such table.
    """

    inputs: Inputs
    labels: Tensor
    numbers: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", inputs_of(self.inputs))

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Rows":
        """The first rows; all, if no count is given."""
        if count is None or count >= len(self):
            return self
        numbers = None if self.numbers is None else self.numbers[:count]
        return Rows(self.inputs.take(range(count)), self.labels[:count], numbers)


class BatchedForward:
    """What the learners of one backbone share (`celora.core.learner.Shared`).

    Args:
        family: of the adapters.
        prefixes: activations below the first adapted layer; None where there are none to keep, because the lowest
            layer is adapted, or the rows have no numbers.
    """

    def __init__(self, backbone: Backbone, family: Family, prefixes: ActivationCache | None = None) -> None:
        self.backbone, self.family, self._activations = backbone, family, prefixes

    @property
    def capacity(self) -> int:
        """Tokens of the largest pass that is worth it (CPU) or fits into memory (CUDA)."""
        return self.backbone.capacity

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return self.backbone.device

    @property
    def name(self) -> str:
        """The backbone's, as it was asked for."""
        return self.backbone.name

    def fingerprint(self) -> str:
        """The backbone's."""
        return self.backbone.fingerprint()

    @property
    def notices(self) -> list[str]:
        """What the user should know of the cache."""
        return self._activations.notices if self._activations else []

    def batch(self, rows: Rows, chosen: Sequence[int]) -> dict[str, Tensor]:
        """These rows with their labels, on the CPU."""
        at = torch.as_tensor(chosen)
        batch = {**self.backbone.batch(rows.inputs, chosen), "labels": rows.labels[at]}
        return batch if rows.numbers is None else {**batch, "row": rows.numbers[at]}

    def size(self, batch: Batch) -> tuple[int, int]:
        """(rows, tokens of the longest); images are all alike."""
        ids = batch.get("input_ids")
        return len(batch["labels"]), self.backbone.image_tokens if ids is None else ids.shape[1]

    def lengths(self, inputs: Inputs) -> list[int]:
        """Tokens in each row; images are all alike."""
        if inputs.kind == "image":
            return [self.backbone.image_tokens] * len(inputs)
        return inputs.lengths(range(len(inputs)))

    def cut(self, batch: Batch) -> list[Batch]:
        """The mini-batch whole, or its rows one by one, without padding, where they are of unlike length."""
        mask = batch.get("attention_mask")
        if mask is None or mask.numel() <= FILLING * int((sizes := mask.sum(1)).sum()):
            return [batch]
        texts = ("input_ids", "attention_mask")
        return [
            {name: t[row : row + 1, :size] if name in texts else t[row : row + 1] for name, t in batch.items()}
            for row, size in enumerate(sizes.tolist())
        ]

    def join(self, batches: Sequence[Batch]) -> Batch:
        """The mini-batches of K clients as one."""
        return join(batches)

    def logits(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """(rows, classes) of a batch; where weights carry a leading client axis, its rows are client-major."""
        features = self._features(weights, batch, dropout_seed)
        return linear(features, weights["head.weight"], weights["head.bias"])

    def _features(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        hidden = None if self._activations is None or dropout_seed is not None else self._activations(batch)
        updates = {name: partial(self.family.delta, w=w) for name, w in modules(weights).items()}
        return self.backbone.encode(batch, updates, dropout_seed, hidden)

    def losses(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """Mean cross entropy: `()`, or `(K,)` where the weights carry a leading client axis."""
        scores = self.logits(weights, batch, dropout_seed)
        labels = batch["labels"].to(scores.device, non_blocking=True)
        clients = _clients(weights)
        if clients is None:
            return F.cross_entropy(scores, labels)
        each = F.cross_entropy(scores, labels, reduction="none", ignore_index=_ABSENT).view(clients, -1)
        return each.sum(1) / (labels.view(clients, -1) != _ABSENT).sum(1)

    def scores(self, asked: Sequence[tuple[Any, Score]]) -> list[Metrics]:
        """`score` (accuracy), `loss` (mean cross entropy) and `rows` of each; `rows` alone on an empty split."""
        rows = [learner.rows(score.split).first(score.rows) for learner, score in asked]
        weights = [{**learner.initial, **score.weights} for learner, score in asked]
        found: list[Metrics] = []
        for logits, one in zip(self._logits(weights, rows), rows, strict=True):
            metrics = {"rows": float(len(one))}
            if len(one):
                right = (logits.argmax(1) == one.labels).float().mean()
                metrics |= {"score": right.item(), "loss": F.cross_entropy(logits, one.labels).item()}
            found.append(metrics)
        return found

    @torch.no_grad()
    def _logits(self, weights: Sequence[Tensors], rows: Sequence[Rows]) -> list[Tensor]:
        """Logits (n, classes) on the CPU for each client's rows, in their order."""
        parts = [(client, piece) for client, own in enumerate(rows) for piece in self._pieces(own.inputs)]
        shapes = [tuple((name, w.shape) for name, w in one.items()) for one in weights]
        lengths = [self.lengths(own.inputs) for own in rows]
        sizes = [(len(piece), lengths[client][piece[-1]]) for client, piece in parts]
        classes = [len(one["head.bias"]) for one in weights]
        device = self.backbone.device
        found = [torch.zeros(len(own), n, device=device) for own, n in zip(rows, classes, strict=True)]
        alike: dict[object, list[int]] = {}  # clients of one rank share passes
        for at, (client, _) in enumerate(parts):
            alike.setdefault(shapes[client], []).append(at)
        together = [[at[i] for i in g] for at in alike.values() for g in passes([sizes[i] for i in at], self.capacity)]
        for group in together:
            members = [parts[at] for at in group]
            batches = [self.batch(rows[client], chosen) for client, chosen in members]
            many = [weights[client] for client, _ in members]
            held = {name: common([one[name] for one in many]) for name in many[0]}
            batch = batches[0] if len(batches) == 1 else join(batches)
            scores = self.logits({name: w.to(device) for name, w in held.items()}, batch)
            for (client, chosen), own in zip(members, scores.view(len(members), -1, scores.shape[-1]), strict=True):
                found[client][torch.tensor(chosen).to(device, non_blocking=True)] = own[: len(chosen)]
        return [logits.cpu() for logits in found]

    def features(self, learners: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Frozen-backbone features (n, d) of each learner's training rows, pooled, and their labels, on the CPU."""
        rows = [learner.rows("train") for learner in learners]
        return list(zip(self._encode(rows), (own.labels for own in rows), strict=True))

    def input_norms(self, rows: Rows) -> dict[str, Tensor]:
        """Module -> ‖X_j‖₂ (d_in,) float32 of the inputs X (tokens, d_in) that these rows give it, on the CPU."""
        squares = {name: torch.zeros(d_in, dtype=torch.float64) for name, (_, d_in) in self.backbone.targets.items()}
        for chosen in self._budgeted(rows.inputs):
            for name, found in self.backbone.squares(self.batch(rows, chosen)).items():
                squares[name] += found
        return {name: found.sqrt().float() for name, found in squares.items()}

    @torch.no_grad()
    def _encode(self, many: Sequence[Rows]) -> list[Tensor]:
        """The frozen backbone is one for all: rows share a pass whoever holds them."""
        rows = _concatenated(many)
        device = self.backbone.device
        found = torch.zeros(len(rows), self.backbone.width, device=device)
        for chosen in self._budgeted(rows.inputs):
            found[torch.tensor(chosen).to(device, non_blocking=True)] = self._features({}, self.batch(rows, chosen))
        return [part.clone() for part in torch.split(found.cpu(), [len(own) for own in many])]

    def _pieces(self, inputs: Inputs) -> Iterator[list[int]]:
        """Rows that fill one shape well, sorted by length, up to the capacity; others one by one."""
        sizes = self.lengths(inputs)
        for rows in self._budgeted(inputs):
            filled = sizes[rows[-1]] * len(rows)
            yield from [rows] if filled <= FILLING * sum(sizes[row] for row in rows) else [[row] for row in rows]

    def _budgeted(self, inputs: Inputs) -> Iterator[list[int]]:
        return budgeted(self.lengths(inputs), self.capacity)


def _concatenated(many: Sequence[Rows]) -> Rows:
    """The rows of several clients as one."""
    labels = torch.cat([rows.labels for rows in many])
    numbers = [rows.numbers for rows in many if rows.numbers is not None]
    inputs = JoinedInputs([rows.inputs for rows in many])
    return Rows(inputs, labels, torch.cat(numbers) if len(numbers) == len(many) else None)


def predict(backbone: Backbone, family: Family, weights: Tensors, inputs: Inputs) -> Tensor:
    """Logits (n, classes) of all rows in their order, on the CPU, for one client's weights."""
    rows = Rows(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    return BatchedForward(backbone, family)._logits([weights], [rows])[0]


def mini_batches(inputs: Inputs, recipe: Recipe, size: int | None, order: torch.Generator) -> Iterator[list[int]]:
    """The rows of each mini-batch as the recipe says, or of one pass in batches of `size`."""
    left, epochs = (recipe.steps, recipe.epochs) if size is None else (None, 1)
    for _ in range(epochs) if left is None else iter(int, 1):
        if not len(inputs):
            return
        for chosen in bucketed(len(inputs), inputs.lengths, size or recipe.batch_size, order):
            if left == 0:
                return
            left = None if left is None else left - 1
            yield chosen


def bucketed(
    count: int, lengths: Callable[[Sequence[int]], Sequence[int]], batch_size: int, order: torch.Generator
) -> Iterator[list[int]]:
    """One pass over all rows, as shuffled batches of rows of like length; one batch may be smaller.

    The lengths of a window of rows are asked for when the first of its batches is reached: so few steps need few
    lengths, however many rows there are.
    """
    shuffled: list[int] = torch.randperm(count, generator=order).tolist()
    window, windows = _WINDOW * batch_size, dict[int, list[int]]()
    for start in torch.randperm(-(-count // batch_size), generator=order).mul(batch_size).tolist():
        first = start - start % window
        if first not in windows:
            rows = shuffled[first : first + window]
            sizes = dict(zip(rows, lengths(rows), strict=True))
            windows[first] = sorted(rows, key=sizes.__getitem__)
        yield windows[first][start - first : start - first + batch_size]


def budgeted(sizes: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """All rows sorted by length, in batches whose padded size stays within the capacity."""
    batch: list[int] = []
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and sizes[row] * (len(batch) + 1) > capacity:
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
        whole = batches[0][name].new_full((len(batches), most, *shape), _FILLING.get(name, 0))
        if name == "attention_mask":
            whole[..., 0] = 1  # a row without any token would have no softmax
        for target, batch in zip(whole, batches, strict=True):
            target[tuple(slice(size) for size in batch[name].shape)] = batch[name]
        joined[name] = whole.flatten(0, 1)
    return joined


def _clients(weights: Mapping[str, Tensor]) -> int | None:
    """K, if any weight carries a leading client axis (all matrices have two axes, the head's bias one)."""
    for name, weight in weights.items():
        if weight.dim() > (1 if name == "head.bias" else 2):
            return weight.shape[0]
    return None
