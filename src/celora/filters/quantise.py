"""Quantisation with error feedback: 8 or 4 bits a number travel, and what rounding loses is sent later."""

from typing import ClassVar, Literal

from celora.core.channel import Encoded, Fields, Stage, Start, Uplink
from celora.errors import PolicyError, WireError
from celora.fields import setting, settings
from celora.lazy import Tensor, torch
from celora.tensors import Tensors
from celora.wire import Schema

_SCALE = ":scale"
_FILL = -8
"""The code of 4 bits that stands for no number: it fills up an odd row."""


@settings
class Quantise(Stage):
    """Send the change of each tensor in 8 or 4 bits a number, with error feedback.

        x = u - d + e      s = max |x| / L      q = round(x / s)      server: u' = d + s·q      e ← x - (u' - d)

    u is each floating-point tensor in a field of named tensors that has a counterpart d of its own dtype
    (`celora.core.channel`), e is what earlier rounds have not sent of it, and L is 127 or 7. The change and not u is
    quantised because it is small and shrinks. Over rounds in which the same names are sent, the sum of what the server
    reads differs from the sum of the true changes by the last e alone, and |e| ≤ s/2. Everything else (whole numbers,
    ciphertexts, data summaries, counts) travels as it is.

    Error feedback: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
    Training of Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes", ICML 2019 (arXiv 1901.09847).

    Rounding is to the nearest code, ties to even: error feedback makes up for its bias, and a round that is repeated
    sends the same bytes. There is one scale s (float32) a tensor: a row of B holds r numbers, so at r = 8 a scale for
    each row would add 4 bytes to 8, or to 4.

    On the wire `q.A` is two tensors, `q.A:int8` (its shape, int8) or `q.A:int4` (uint8, its last side halved: two
    numbers a byte, the first in the low bits) and `q.A:scale`. Residuals (float32) stay at the client. Where a
    tensor changes its shape from round to round (a pruned rank), e starts at 0 again.
    """

    packs: ClassVar[bool] = True

    bits: Literal[4, 8] = setting(8, "bits a number: 8 or 4")

    @property
    def _suffix(self) -> str:
        return f":int{self.bits}"

    def describe(self) -> str:
        """The bits."""
        return f"quantise to {self.bits} bits"

    def covers(self, tensor: Tensor, start: Tensor | None) -> bool:
        """Floating-point tensors with a counterpart of the same dtype."""
        return (
            start is not None and tensor.is_floating_point() and tensor.dtype == start.dtype and tensor.numel() > 0
        ) and tensor.dim() > 0

    def encode(self, up: Uplink, state: Fields) -> Encoded:
        """Codes and scales, and the new residuals.

        Raises:
            PolicyError: if the change is not finite.
        """
        fields, kept = dict[str, dict[str, Tensor]](), {field: dict(tensors) for field, tensors in state.items()}
        for field, tensors in up.fields.items():
            residuals, packed = kept.setdefault(field, {}), fields.setdefault(field, {})
            for name, u in tensors.items():
                d = up.start[field][name].detach().cpu()
                x = u.detach().cpu().double() - d.double()
                if name in residuals and residuals[name].shape == x.shape:
                    x += residuals[name].double()
                scale, codes = self._quantised(x)
                residual = (x - (_read(d, scale, codes).double() - d.double())).float()
                if not bool(residual.isfinite().all()):
                    raise PolicyError(
                        f"{up.kind} is not sent: the filter quantise found NaN or infinity in {field}/{name}, expected "
                        "finite numbers; lower train.lr, or leave out the filter ([[filters]])"
                    )
                residuals[name] = residual
                packed |= {f"{name}{self._suffix}": self._packed(codes), f"{name}{_SCALE}": scale}
        return Encoded(fields, kept)

    def decode(self, tensors: Tensors, start: Start) -> Tensors:
        """d + s·q in place of each pair of codes and scale.

        Raises:
            WireError: if a pair is incomplete, or its tensor is unknown or sent twice.
        """
        found = dict[str, Tensor]()
        scales = {f"{name.removesuffix(self._suffix)}{_SCALE}" for name in tensors if name.endswith(self._suffix)}
        for sent, tensor in tensors.items():
            if sent in scales:
                continue
            name = sent.removesuffix(self._suffix)
            if name in found:
                raise WireError(f"{name}: found it twice, quantised and not, expected it once")
            if name == sent:
                found[name] = tensor
                continue
            codes, scale = self._unpacked(sent, tensor), tensors.get(f"{name}{_SCALE}")
            if scale is None or scale.dtype != torch.float32 or scale.dim():
                raise WireError(f"{sent}: found no scale for it, expected {name}{_SCALE}, a float32 number")
            d = start(name, tuple(codes.shape))
            if d is None or not d.is_floating_point():
                raise WireError(f"{sent}: found {tuple(codes.shape)}, of which there is nothing to be a change of")
            found[name] = _read(d, scale, codes)
        return found

    def wire(self, schema: Schema) -> Schema:
        """Beside each floating-point tensor its codes and its scale, one bit each for which of them travel."""
        entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
        for name, (dtype, shape) in schema.entries.items():
            entries[name] = dtype, shape
            if dtype.is_floating_point and shape:
                half = (*shape[:-1], (shape[-1] + 1) // 2)
                entries[f"{name}{self._suffix}"] = (torch.int8, shape) if self.bits == 8 else (torch.uint8, half)
                entries[f"{name}{_SCALE}"] = torch.float32, ()
        return Schema(entries)

    def meets(self, required: Stage) -> bool:
        """As few bits."""
        return isinstance(required, Quantise) and self.bits <= required.bits

    def _quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s (), float32, and q of the shape of x, int8."""
        most = 2 ** (self.bits - 1) - 1
        scale = (x.abs().max() / most).float()
        if not scale > 0:  # no change at all, one too small for float32, or NaN
            return torch.zeros_like(scale), torch.zeros_like(x, dtype=torch.int8)
        return scale, (x / scale.double()).round().clamp(-most, most).nan_to_num().to(torch.int8)

    def _packed(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        if codes.shape[-1] % 2:
            codes = torch.cat([codes, codes.new_full((*codes.shape[:-1], 1), _FILL)], dim=-1)
        nibbles = codes.view(torch.uint8) & 15
        return nibbles[..., ::2] | nibbles[..., 1::2] << 4

    def _unpacked(self, sent: str, tensor: Tensor) -> Tensor:
        """The codes, int8.

        Raises:
            WireError: if they are not what `_packed` makes.
        """
        expected = torch.int8 if self.bits == 8 else torch.uint8
        if tensor.dtype != expected or not tensor.dim() or not tensor.numel():
            raise WireError(f"{sent}: found {tensor.dtype} {tuple(tensor.shape)}, expected {expected} (…, n)")
        if self.bits == 8:
            return tensor
        nibbles = torch.stack([tensor & 15, tensor >> 4], dim=-1).flatten(-2).to(torch.int8)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
        last = codes[..., -1] == _FILL
        odd = bool(last.all())
        if bool((codes == _FILL).sum() != (last.sum() if odd else 0)):
            raise WireError(f"{sent}: found the code {_FILL} among the numbers, expected it at the end of each odd row")
        return codes[..., :-1] if odd else codes


def _read(d: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """What the server reads, d + s·q, in the dtype of d; the client computes it too."""
    return (d.detach().cpu().double() + scale.double() * codes.double()).to(d.dtype)
