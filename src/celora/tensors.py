"""Named tensors, and the four things an algorithm does to them: select, mean, overlay, flatten.

A factor's name ends in its letter, `encoder.layer.0.attention.self.query.C`; the tensors of the task head are
`head.weight` and `head.bias`. `part` of a name is that letter, or "head".
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Names = Callable[[str], bool]
"""A set of names, as a predicate."""


def part(name: str) -> str:
    """Which part of the model a tensor belongs to: "A", "B", "C" or "head".

    >>> part("encoder.layer.0.attention.self.query.C"), part("head.bias")
    ('C', 'head')
    """
    return "head" if name.startswith("head.") else name.rpartition(".")[2]


def only(*parts: str) -> Names:
    """Names whose part is one of `parts`."""
    return lambda name: part(name) in parts


def but(*parts: str) -> Names:
    """Names whose part is none of `parts`."""
    return lambda name: part(name) not in parts


def select(tensors: Tensors, names: Names) -> dict[str, Tensor]:
    """The tensors whose name is in `names`, in their order."""
    return {name: tensor for name, tensor in tensors.items() if names(name)}


def mean(many: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of each name over those who hold it.

    Args:
        many: one mapping per holder; a name absent from a mapping does not count there.
        weights: one non-negative number per mapping; they need not sum to 1.

    Returns:
        Every name that anybody holds, `sum_i (w_i / sum_j w_j) x_i`, accumulated in the order given.

    Raises:
        ValueError: if there are more mappings than weights or the other way round, or all weights of a name are 0.

    >>> one, two = {"A": torch.tensor([1.0])}, {"A": torch.tensor([4.0]), "B": torch.tensor([5.0])}
    >>> mean([one, two], [2, 1])
    {'A': tensor([2.]), 'B': tensor([5.])}
    """
    totals: dict[str, float] = {}
    for tensors, weight in zip(many, weights, strict=True):
        for name in tensors:
            totals[name] = totals.get(name, 0.0) + weight
    empty = sorted(name for name, total in totals.items() if not total > 0)
    if empty:
        raise ValueError(f"the weights of {empty[0]!r} sum to {totals[empty[0]]}; a mean needs a positive sum")
    sums: dict[str, Tensor] = {}
    for tensors, weight in zip(many, weights, strict=True):
        for name, tensor in tensors.items():  # shares, not weights: a finite mean must not overflow on its way
            share = weight / totals[name] * tensor
            sums[name] = sums[name] + share if name in sums else share
    return sums


def common(many: Sequence[Tensor]) -> Tensor:
    """One tensor (...) for all where all hold the same object, and else a stack (K, ...)."""
    return many[0] if all(tensor is many[0] for tensor in many) else torch.stack(list(many))


def flatten(tensors: Tensors) -> Tensor:
    """All entries as one vector, in the mapping's order; a leading client axis is not kept."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]) if tensors else torch.zeros(0)


def nbytes(tensors: Tensors) -> int:
    """Bytes of tensor content."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
