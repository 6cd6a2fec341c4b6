"""Filters: what a site does to an uplink record before it is packed, because its policy says so."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from celora.errors import PolicyError
from celora.fields import Positive, setting, settings
from celora.tensors import Tensors
from celora.wire.records import name_of


@settings
class Clip:
    """Scale the change of what is sent down to an L2 norm (`clip`)."""

    name: Literal["clip"] = setting(..., "which filter this is")
    norm: Positive = setting(..., "largest L2 norm of the change of all tensors together", strict=True)


@dataclass(frozen=True)
class Clipped:
    """What `clip` did.

    Attributes:
        record: what may be sent.
        norm: of the change before.
        factor: the change was multiplied by it; 1: it was small enough.
        cosine: between the change before and after: 1 but for rounding, and a check that the direction was kept.
        tensors: how many were part of it, and how many have nothing to be compared with and were left alone.
    """

    record: Any
    norm: float
    factor: float
    cosine: float
    tensors: tuple[int, int]

    @property
    def note(self) -> str:
        """One line for a log at the site."""
        done, left = self.tensors
        what = f"clipped by {self.factor:.2g}" if self.factor < 1 else "not clipped"
        return f"{what}: change of {done} tensors of norm {self.norm:.3g}, cosine {self.cosine:.4f}; {left} left alone"


def clip(up: Any, down: object, initial: Tensors, norm: float) -> Clipped:
    """Scale the change of what is sent, as far as needed for its norm to be at most `norm`.

        u' = d + (u - d) · min(1, norm / ‖u - d‖)        the L2 norm of all tensors together, in float64

    u is each floating-point tensor in a field of named tensors, and u' is rounded to its dtype. d is its counterpart,
    of the same name and shape: in the downlink's field of the same name, else in another of its fields, else in
    `initial`. Whatever has no counterpart (ciphertexts, summaries, counts) is left alone. A record whose fields are all
    empty is given back as it is.

    This is the clipping of McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018
    (arXiv 1710.06963), and nothing more of that paper: it bounds how far one site can pull an average. Clipping alone
    is no differential privacy; that needs noise, and an accountant of it.

    Raises:
        PolicyError: if no tensor has a counterpart, or the change is not finite: nothing may be sent then.
    """
    changes: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # (field, name) -> d and u - d, float64
    total, kind = 0, name_of(type(up))
    for field, tensors in _named(up):
        places = [tensors for name, tensors in _named(down) if name == field]
        places += [tensors for name, tensors in _named(down) if name != field]
        for name, u in tensors.items():
            total += 1
            known = (place[name] for place in (*places, initial) if name in place)
            d = next((tensor for tensor in known if tensor.shape == u.shape), None)
            if d is not None and u.is_floating_point():
                start = d.detach().to(u.device, torch.float64)
                changes[field, name] = start, u.detach().to(torch.float64) - start
    if not changes:
        if all(is_empty(getattr(up, field.name)) for field in dataclasses.fields(up)):
            return Clipped(up, 0.0, 1.0, 1.0, (0, 0))
        raise PolicyError(
            f"{kind} does not leave this site: its policy requires the filter clip, which found no tensor with a "
            "counterpart in what was received, expected at least one; choose another algorithm, or change the policy "
            "at the site ([[filters]])"
        )
    length = math.sqrt(sum(float(change.square().sum()) for _, change in changes.values()))
    if not math.isfinite(length):
        raise PolicyError(
            f"{kind} does not leave this site: its policy requires the filter clip, which found NaN or infinity in the "
            "change, expected finite numbers; lower train.lr, or change the policy at the site ([[filters]])"
        )
    factor = min(1.0, norm / length) if length > 0 else 1.0
    counts = len(changes), total - len(changes)
    if factor == 1.0:
        return Clipped(up, length, factor, 1.0, counts)
    replaced = {field: dict(tensors) for field, tensors in _named(up)}
    along, after = 0.0, 0.0
    for (field, name), (start, change) in changes.items():
        replaced[field][name] = new = (start + factor * change).to(replaced[field][name].dtype)
        kept = new.to(torch.float64) - start
        along, after = along + float((change * kept).sum()), after + float(kept.square().sum())
    cosine = along / (length * math.sqrt(after)) if after > 0 else 0.0
    return Clipped(dataclasses.replace(up, **replaced), length, factor, cosine, counts)


def is_empty(value: object) -> bool:
    """Whether a field holds nothing that could leave: None, or a text, bytes, tuple or mapping without content."""
    return value is None or (isinstance(value, str | bytes | tuple | Mapping) and not value)


def _named(value: Any) -> Iterator[tuple[str, Tensors]]:
    """The fields of a record that hold named tensors."""
    for field in dataclasses.fields(value):
        tensors = getattr(value, field.name)
        if isinstance(tensors, Mapping) and tensors and all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            yield field.name, tensors
