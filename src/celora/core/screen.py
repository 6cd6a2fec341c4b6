"""Is a reply fit to be aggregated? One NaN or one odd shape must cost its sender a round, and nobody else."""

import dataclasses
from collections.abc import Mapping

from celora.core.metrics import ACCURACY, Metric
from celora.lazy import Tensor
from celora.marks import Bounded, marked_values
from celora.tensors import Names, Tensors
from celora.wire import Schema


def screen(
    up: object, schema: Schema, shares: Names, *, mixed_ranks: bool = False, partial: bool = False
) -> str | None:
    """Why a reply cannot be aggregated, or None.

    Args:
        up: the uplink record. A `Tensors` field must hold exactly the shared names, each with its dtype and shape; all
            floating-point content must be finite; a number that is marked `Bounded` must be within its bounds.
        schema: the weights everybody starts from.
        shares: the names that travel.
        mixed_ranks: whether an A may have fewer rows, and its B as many fewer columns, than the schema says.
        partial: whether a reply may lack some of the shared names, though not all.
    """
    for path, value, bounds in marked_values(up, Bounded):
        if value is not None and not bounds.least <= value <= bounds.most:
            found = str(value) if abs(value) < 10**12 else f"a number of {value.bit_length()} bits"
            return f"{'.'.join(path)}: found {found}, expected {bounds.least} to {bounds.most}"
    expected = {name for name in schema.entries if shares(name)}
    for field in dataclasses.fields(up):  # type: ignore[arg-type]  # every record is a dataclass
        value = getattr(up, field.name)
        if isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values()):
            if (missing := sorted(expected - set(value))) and not (partial and value):
                return f"{field.name}: {len(missing)} of {len(expected)} tensors are missing (first: {missing[0]})"
            if foreign := sorted(set(value) - expected):
                return f"{field.name}: found {foreign[0]}, which this algorithm does not share"
            for name, tensor in value.items():
                dtype, shape = schema.entries[name]
                if mixed_ranks:
                    shape = _at_rank(name, shape, value)
                if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                    found = f"{tensor.dtype} {tuple(tensor.shape)}"
                    return f"{field.name}[{name}]: found {found}, expected {dtype} {shape}"
        if broken := not_finite(value, field.name):
            return f"{broken}: found NaN or infinity, expected finite numbers"
    return None


def _at_rank(name: str, shape: tuple[int, ...], tensors: Tensors) -> tuple[int, ...]:
    """The shape this tensor has at the rank of its module's A, 1 to that of the schema."""
    module, _, letter = name.rpartition(".")
    a = tensors.get(f"{module}.A")
    if letter not in ("A", "B") or a is None or a.dim() != 2:
        return shape
    full = shape[0] if letter == "A" else shape[1]
    rank = min(max(len(a), 1), full)
    return (rank, shape[1]) if letter == "A" else (shape[0], rank)


def not_finite(value: object, where: str) -> str | None:
    """Where in a record there is NaN or infinity, or None."""
    if isinstance(value, Tensor):
        return None if bool(value.isfinite().all()) else where
    if isinstance(value, float):
        return None if abs(value) < float("inf") else where
    items: dict[str, object] = {}
    if isinstance(value, Mapping):
        items = {f"{where}[{key}]": item for key, item in value.items()}
    elif isinstance(value, tuple):
        items = {f"{where}[{position}]": item for position, item in enumerate(value)}
    elif dataclasses.is_dataclass(value):
        items = {f"{where}.{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    return next((found for name, item in items.items() if (found := not_finite(item, name))), None)


def odd_score(scores: Mapping[str, Mapping[str, float]], headline: Metric = ACCURACY) -> str | None:
    """Name of the first score that the headline cannot have, or None.

    The best round is chosen by scores, so one site must not choose it for all.
    """
    for moment, metrics in scores.items():
        if "score" in metrics and not headline.admits(metrics["score"]):
            return f"scores[{moment}]: found {metrics['score']:g}, expected {headline.range}"
    return None
