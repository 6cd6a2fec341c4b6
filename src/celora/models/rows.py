"""Rows of a client, and which of them go together: mini-batches to train on, passes to evaluate in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from celora.core.learner import Batch, Recipe
from celora.core.reading import Inputs
from celora.core.task import Examples
from celora.core.training import FILLING
from celora.tensors import Tensors

_WINDOW = 8
"""Batches among which rows are sorted by length: enough to bucket well, few enough to stay shuffled."""
ALONG_TOKENS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "word_numbers"})
"""What is read of a text: tensors whose second axis is that of the tokens."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a data set, by position: one split of a client. Nothing is copied."""

    examples: Examples
    at: Sequence[int]

    def __len__(self) -> int:
        return len(self.at)

    def first(self, count: int | None) -> "Rows":
        """The first rows; all, if no count is given."""
        return self if count is None else Rows(self.examples, self.at[:count])

    def chosen(self, rows: Sequence[int]) -> list[int]:
        """Positions in the data set of the client's rows with these numbers."""
        return [self.at[row] for row in rows]

    @property
    def targets(self) -> Tensors:
        """Of all rows."""
        return self.examples.targets(self.at)


def unlabelled(inputs: Inputs) -> Rows:
    """Rows of which nothing is known but what a network reads."""
    return Rows(Examples(inputs, lambda rows: {}), range(len(inputs)))


Lengths = Callable[[Sequence[int]], Sequence[int]]
"""Numbers of rows -> tokens in each."""


def mini_batches(
    count: int, lengths: Lengths, recipe: Recipe, size: int | None, order: torch.Generator
) -> Iterator[list[int]]:
    """The rows of each mini-batch as the recipe says, or of one pass in batches of `size`."""
    left, epochs = (recipe.steps, recipe.epochs) if size is None else (None, 1)
    for _ in range(epochs) if left is None else iter(int, 1):
        if not count:
            return
        for chosen in bucketed(count, lengths, size or recipe.batch_size, order):
            if left == 0:
                return
            left = None if left is None else left - 1
            yield chosen


def bucketed(count: int, lengths: Lengths, batch_size: int, order: torch.Generator) -> Iterator[list[int]]:
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


def well_filled(sizes: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Rows that fill one shape well, sorted by length, up to the capacity; others one by one."""
    for rows in budgeted(sizes, capacity):
        filled = sizes[rows[-1]] * len(rows)
        yield from [rows] if filled <= FILLING * sum(sizes[row] for row in rows) else [[row] for row in rows]


def count_rows(batch: Batch) -> int:
    """Rows of a batch: every tensor in it has as many."""
    return len(next(iter(batch.values())))


def cut(batch: Batch, along_tokens: frozenset[str]) -> list[Batch]:
    """The mini-batch whole, or its rows one by one, without padding, where they are of unlike length.

    Args:
        along_tokens: names of the tensors whose second axis is that of the tokens.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.numel() <= FILLING * int((sizes := mask.sum(1)).sum()):
        return [batch]
    return [
        {name: t[row : row + 1, :size] if name in along_tokens else t[row : row + 1] for name, t in batch.items()}
        for row, size in enumerate(sizes.tolist())
    ]


def join(batches: Sequence[Batch], fillers: Mapping[str, float]) -> Batch:
    """The mini-batches of K clients as one, client-major, for weights with a leading client axis.

    Texts are padded to the longest row of all, and each client to the most rows of any, with the filler of each name
    (0, if it has none); losses ignore the filling. Rows of images and texts are filled up with copies of the first one,
    as images and their places among the tokens belong together.
    """
    most = max(map(count_rows, batches))
    joined: dict[str, Tensor] = {}
    for name in batches[0]:
        shape = [max(sizes) for sizes in zip(*(batch[name].shape[1:] for batch in batches), strict=True)]
        whole = batches[0][name].new_full((len(batches), most, *shape), fillers.get(name, 0))
        if name == "attention_mask":
            whole[..., 0] = 1  # a row without any token would have no softmax
        copied = {"pixel_values", "input_ids"} <= batches[0].keys() and name not in fillers
        for target, batch in zip(whole, batches, strict=True):
            target[tuple(slice(size) for size in batch[name].shape)] = batch[name]
            if copied:
                target[len(batch[name]) :] = target[:1]
        joined[name] = whole.flatten(0, 1)
    return joined
