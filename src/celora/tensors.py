"""Named tensors, and the four things an algorithm does to them: select, mean, overlay, flatten.

A factor's name ends in its letter, `encoder.layer.0.attention.self.query.C`; the tensors of the task head are
`head.weight` and `head.bias`. `part` of a name is that letter, or "head".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from celora.lazy import Tensor, torch

Tensors = Mapping[str, Tensor]
Names = Callable[[str], bool]
"""A set of names, as a predicate."""


def part(name: str) -> str:
    """Which part of the model a tensor belongs to: "A", "B", "C" or "head".

    >>> part("encoder.layer.0.attention.self.query.C"), part("head.bias")
    ('C', 'head')
    """
    return "head" if name.startswith("head.") else name.rpartition(".")[2]


def example(of: str) -> str:
    """A name that belongs to this part.

    >>> example("C"), example("head")
    ('module.C', 'head.weight')
    """
    return "head.weight" if of == "head" else f"module.{of}"


def is_head(name: str) -> bool:
    """Whether a tensor belongs to the task head, and not to an adapter."""
    return part(name) == "head"


def only(*parts: str) -> Names:
    """Names whose part is one of `parts`."""
    return lambda name: part(name) in parts


def but(*parts: str) -> Names:
    """Names whose part is none of `parts`."""
    return lambda name: part(name) not in parts


def select(tensors: Tensors, names: Names) -> dict[str, Tensor]:
    """The tensors whose name is in `names`, in their order."""
    return {name: tensor for name, tensor in tensors.items() if names(name)}


class Mean:
    """The weighted mean of each name over those who hold it, of which one holder's tensors are needed at a time."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """One more holder, with a non-negative weight; a name that it does not have does not count there."""
        for name, tensor in tensors.items():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float64), copy=True).mul_(weight)
            self._sums[name] = self._sums[name].add_(wide) if name in self._sums else wide
            self._totals[name] = self._totals.get(name, 0.0) + weight
            self._dtypes.setdefault(name, tensor.dtype)

    def sums(self) -> dict[str, Tensor]:
        """`sum_i w_i x_i` of every name that anybody holds, summed in float64 in the order given, cast back."""
        return {name: total.to(self._dtypes[name]) for name, total in self._sums.items()}

    def result(self) -> dict[str, Tensor]:
        """Every name that anybody holds, `sum_i w_i x_i / sum_j w_j`, summed in float64 in the order given, cast back.

        Raises:
            ValueError: if all weights of a name are 0.
        """
        for name, total in self._totals.items():
            if not total > 0:
                raise ValueError(f"the weights of {name!r} sum to {total}; a mean needs a positive sum")
        return {name: (total / self._totals[name]).to(self._dtypes[name]) for name, total in self._sums.items()}


def mean(weighted: Iterable[tuple[Tensors, float]]) -> dict[str, Tensor]:
    """The `Mean` of these, for each holder its tensors and a weight; the weights need not sum to 1.

    Raises:
        ValueError: if all weights of a name are 0.

    >>> one, two = {"A": torch.tensor([1.0])}, {"A": torch.tensor([4.0]), "B": torch.tensor([5.0])}
    >>> mean([(one, 2), (two, 1)])
    {'A': tensor([2.]), 'B': tensor([5.])}
    """
    total = Mean()
    for tensors, weight in weighted:
        total.add(tensors, weight)
    return total.result()


def common(many: Sequence[Tensor]) -> Tensor:
    """One tensor (...) for all where all hold the same object, and else a stack (K, ...)."""
    return many[0] if all(tensor is many[0] for tensor in many) else torch.stack(list(many))


def on_device(many: Sequence[Tensors], device: "torch.device") -> list[dict[str, Tensor]]:
    """The same tensors on a device; what is one object for several of them still is, and is moved once."""
    given = {id(tensor): tensor for tensors in many for tensor in tensors.values()}
    moved = {at: tensor.to(device) for at, tensor in given.items()}
    return [{name: moved[id(tensor)] for name, tensor in tensors.items()} for tensors in many]


def flatten(tensors: Tensors) -> Tensor:
    """All entries as one vector, in the mapping's order; a leading client axis is not kept."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]) if tensors else torch.zeros(0)


def nbytes(tensors: Tensors) -> int:
    """Bytes of tensor content."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
