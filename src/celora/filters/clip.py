"""Clipping: the change of what is sent has a bounded norm."""

import math

from celora.core.channel import Encoded, Fields, Stage, Uplink
from celora.errors import PolicyError
from celora.fields import Positive, setting, settings
from celora.lazy import Tensor, torch


@settings
class Clip(Stage):
    """Scale the change of what is sent down to an L2 norm.

        u' = d + (u - d) · min(1, norm / ‖u - d‖)        the L2 norm of all tensors together, in float64

    u is each floating-point tensor in a field of named tensors that has a counterpart d (`celora.core.channel`), and u'
    is rounded to its dtype. Everything else (ciphertexts, summaries, whole numbers) is left alone.

    This is the clipping of McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018
    (arXiv 1710.06963), and nothing more of that paper: it bounds how far one site can pull an average. It does not
    promise protection: clipping alone is no differential privacy, which needs noise and an accountant of it. If
    `quantise` follows, the bound holds but for the difference of two residuals.
    """

    norm: Positive = setting(..., "largest L2 norm of the change of all tensors together", strict=True)

    def describe(self) -> str:
        """The norm."""
        return f"clip to norm {self.norm:g}"

    def covers(self, tensor: Tensor, start: Tensor | None) -> bool:
        """Floating-point tensors with a counterpart."""
        return start is not None and tensor.is_floating_point()

    def encode(self, up: Uplink, state: Fields) -> Encoded:
        """Scale the change as far as needed.

        Raises:
            PolicyError: if the record has floating-point tensors and none of them a counterpart, or if the change is
                not finite.
        """
        if not up.fields:
            if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in up.others.values()):
                raise PolicyError(
                    f"{up.kind} is not sent: the filter clip found no tensor with a counterpart in what was received, "
                    "expected at least one; choose another algorithm, or leave out the filter ([[filters]])"
                )
            return Encoded(up.fields)
        start = {key: d.detach().cpu().double() for key, d in _flat(up.start).items()}
        change = {key: u.detach().cpu().double() - start[key] for key, u in _flat(up.fields).items()}
        length = math.sqrt(sum(float(part.square().sum()) for part in change.values()))
        if not math.isfinite(length):
            raise PolicyError(
                f"{up.kind} is not sent: the filter clip found NaN or infinity in the change, expected finite numbers; "
                "lower train.lr, or leave out the filter ([[filters]])"
            )
        factor = min(1.0, self.norm / length) if length > 0 else 1.0
        what, cosine, fields = "not clipped", 1.0, up.fields
        if factor < 1.0:
            clipped = {key: (start[key] + factor * change[key]).to(u) for key, u in _flat(up.fields).items()}
            fields = {field: {name: clipped[field, name] for name in tensors} for field, tensors in up.fields.items()}
            what, cosine = f"clipped by {factor:.2g}", _cosine(change, clipped, start)
        return Encoded(
            fields,
            note=f"{what}: change of {len(change)} tensors of norm {length:.3g}, cosine {cosine:.4f}; "
            f"{len(up.others)} left alone",
        )

    def meets(self, required: Stage) -> bool:
        """A norm as small."""
        return isinstance(required, Clip) and self.norm <= required.norm


_Flat = dict[tuple[str, str], Tensor]


def _flat(fields: Fields) -> _Flat:
    """(field, name) -> tensor."""
    return {(field, name): tensor for field, tensors in fields.items() for name, tensor in tensors.items()}


def _cosine(change: _Flat, clipped: _Flat, start: _Flat) -> float:
    """Between the change before and after: 1 but for rounding, a check that the direction was kept."""
    after = {key: new.to(torch.device("cpu"), torch.float64) - start[key] for key, new in clipped.items()}
    along = sum(float((change[key] * part).sum()) for key, part in after.items())
    lengths = [math.sqrt(sum(float(part.square().sum()) for part in parts.values())) for parts in (change, after)]
    return along / math.prod(lengths) if min(lengths) > 0 else 0.0
