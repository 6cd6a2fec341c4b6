"""Adapter families: which matrices stand at an adapted module, and what they add to its output.

    family      Δ(x), times s = alpha / rank                    who uses it
    Lora        B A x                                           FedIT and most others
    Tri         B C A x                                         CE-LoRA
    FixedBases  B C A x, A and B orthonormal, C = 0             Fed-SB
    Heads       Σ_h s_h B_h C_h A_h x                           RAVAN
    Residual    B A x + W x                                     FLoRA, FedEx-LoRA: W is what was merged into W0
    Dual        B A x + B2 A2 x                                 PF2LoRA
    Gated       a(x) B A x + (1 − a(x)) B2 A2 x                 FedALT
    Pair        (1 − b) B (P A x + Q) + b B (P2 A x + Q2)       Co-LoRA

A weight's name is its module's and its part's, `encoder.layer.0.attention.self.query.A`. Every part is a matrix, so a
leading client axis K can be told. All but a few start with Δ = 0, so that clients start from the frozen backbone.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from celora.lazy import F, Tensor, torch
from celora.tensors import Tensors, is_head, part

Draw = Literal["down", "up", "core", "zero", "one", "kaiming", "rows", "columns"]
"""How a part starts: A, B and C as `adapter.init` says ("down", "up", "core"); 0 or 1; as a linear layer's weight
("kaiming"); or with orthonormal rows or columns, whatever `adapter.init` says."""


@dataclass(frozen=True)
class Part:
    """A matrix (rows, columns) and how it starts."""

    rows: int
    columns: int
    draw: Draw


class Family(Protocol):
    """What stands at an adapted module."""

    @property
    def name(self) -> str:
        """In tables."""

    @property
    def update(self) -> str:
        """What is added, as an equation."""

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """Part -> its matrix, for a module (d_out, d_in)."""

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """Δ(x) (rows, ..., d_out), without s, of x (rows, ..., d_in).

        Args:
            w: part -> matrix, each with or without a leading client axis K; rows are then client-major.
        """

    def lora(self, w: Tensors) -> tuple[Tensor, Tensor] | None:
        """A (r', d_in) and B (d_out, r') with B A x = Δ(x); None where Δ is not linear."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` for one client, or for K clients in one batched product.

    Args:
        x: (rows, ..., in); with a client axis, rows = K · b, client-major.
        weight: (out, in), or (K, out, in).
        bias: (out,), or (K, out), with or without an axis at the weight.

    Returns:
        (rows, ..., out).
    """
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return F.linear(x, weight, bias)
    if weight.dim() == 2 and bias is not None:
        weight = weight.expand(len(bias), -1, -1)
    groups = x.reshape(weight.shape[0], -1, x.shape[-1])
    y = groups @ weight.mT
    if bias is not None:
        y = y + bias.unsqueeze(-2)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def modules(weights: Tensors) -> dict[str, dict[str, Tensor]]:
    """Module -> part -> matrix; the head is no adapted module.

    >>> modules({"q.A": torch.ones(1, 2), "q.B": torch.ones(2, 1), "head.bias": torch.ones(3)}).keys()
    dict_keys(['q'])
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if not is_head(name):
            module, _, of = name.rpartition(".")
            found.setdefault(module, {})[of] = weight
    return found


def truncated(weights: Tensors, rank: int) -> dict[str, Tensor]:
    """A LoRA of at most this rank: the first rows of each A and columns of each B; nothing else is touched."""
    cut = {"A": lambda w: w[:rank], "B": lambda w: w[:, :rank]}
    return {name: cut[of](weight).clone() if (of := part(name)) in cut else weight for name, weight in weights.items()}


@dataclass(frozen=True)
class Lora:
    """ΔW = s·B A (Hu et al., ICLR 2022)."""

    name: str = "lora"
    update: str = "ΔW = s·B A"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (r, d_in), B (d_out, r)."""
        return {"A": Part(rank, d_in, "down"), "B": Part(d_out, rank, "up")}

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """B A x."""
        return linear(linear(x, w["A"]), w["B"])

    def lora(self, w: Tensors) -> tuple[Tensor, Tensor]:
        """As they are."""
        return w["A"], w["B"]


@dataclass(frozen=True)
class Tri:
    """ΔW = s·B C A (CE-LoRA; TriLoRA and LoRA-XS have the same shape)."""

    name: str = "tri"
    update: str = "ΔW = s·B C A"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (r, d_in), B (d_out, r), C (r, r)."""
        return {**Lora().parts(rank, d_in, d_out), "C": Part(rank, rank, "core")}

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """B C A x."""
        return linear(linear(x, w["A"]), w["B"] @ w["C"])

    def lora(self, w: Tensors) -> tuple[Tensor, Tensor]:
        """C is folded into B."""
        return w["A"], w["B"] @ w["C"]


@dataclass(frozen=True)
class FixedBases(Tri):
    """ΔW = s·B C A between orthonormal bases that are not trained (Fed-SB)."""

    name: str = "fixed bases"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (r, d_in), B (d_out, r), C (r, r) = 0."""
        return {"A": Part(rank, d_in, "rows"), "B": Part(d_out, rank, "columns"), "C": Part(rank, rank, "zero")}


@dataclass(frozen=True)
class Heads:
    """ΔW = s·Σ_h s_h B_h C_h A_h, between bases that are orthonormal over all heads (RAVAN)."""

    heads: int
    name: str = "heads"
    update: str = "ΔW = s·Σ_h s_h B_h C_h A_h"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (H r, d_in), B (d_out, H r); for each head h = 1 … H its core Ch (r, r) and its scale Sh (1, 1)."""
        wide = self.heads * rank
        return {
            "A": Part(wide, d_in, "rows"),
            "B": Part(d_out, wide, "columns"),
            **{core: Part(rank, rank, "zero") for core in self.cores},
            **{scale: Part(1, 1, "one") for scale in self.scales},
        }

    @property
    def cores(self) -> tuple[str, ...]:
        """C1 … CH."""
        return tuple(f"C{h}" for h in range(1, self.heads + 1))

    @property
    def scales(self) -> tuple[str, ...]:
        """S1 … SH."""
        return tuple(f"S{h}" for h in range(1, self.heads + 1))

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """[s_1 B_1 C_1 | … | s_H B_H C_H] A x."""
        return linear(linear(x, w["A"]), self._up(w))

    def lora(self, w: Tensors) -> tuple[Tensor, Tensor]:
        """Cores and scales are folded into B."""
        return w["A"], self._up(w)

    def _up(self, w: Tensors) -> Tensor:
        """[s_1 B_1 C_1 | … | s_H B_H C_H], (..., d_out, H r); some heads may have a client axis, and others none."""
        bases = w["B"].chunk(self.heads, dim=-1)
        folded = [b @ (w[c] * w[s]) for b, c, s in zip(bases, self.cores, self.scales, strict=True)]
        lead = max((block.shape[:-2] for block in folded), key=len)
        return torch.cat([block.expand(*lead, -1, -1) for block in folded], dim=-1)


@dataclass(frozen=True)
class Residual:
    """ΔW = s·(B A + W): a LoRA, and what has been merged into the frozen weight so far."""

    name: str = "residual"
    update: str = "ΔW = s·(B A + W)"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (r, d_in), B (d_out, r), W (d_out, d_in) = 0."""
        return {**Lora().parts(rank, d_in, d_out), "W": Part(d_out, d_in, "zero")}

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """B A x + W x."""
        return linear(linear(x, w["A"]), w["B"]) + linear(x, w["W"])

    def lora(self, w: Tensors) -> tuple[Tensor, Tensor]:
        """W by its singular vectors, beside A and B: of a rank up to r + min(d_in, d_out)."""
        u, values, vh = torch.linalg.svd(w["W"], full_matrices=False)
        keep = values > 1e-6 * values.max()
        return torch.cat([w["A"], vh[keep]]), torch.cat([w["B"], (u * values)[:, keep]], dim=1)


@dataclass(frozen=True)
class Dual:
    """ΔW = s·(B A + B2 A2): two LoRAs side by side, the second of rank max(1, r / divisor)."""

    divisor: int = 1
    name: str = "dual"
    update: str = "ΔW = s·(B A + B2 A2)"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (r, d_in), B (d_out, r), A2 (r2, d_in), B2 (d_out, r2)."""
        second = max(1, rank // self.divisor)
        return {
            **Lora().parts(rank, d_in, d_out),
            "A2": Part(second, d_in, "down"),
            "B2": Part(d_out, second, "up"),
        }

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """B A x + B2 A2 x."""
        return linear(linear(x, w["A"]), w["B"]) + linear(linear(x, w["A2"]), w["B2"])

    def lora(self, w: Tensors) -> tuple[Tensor, Tensor]:
        """Ranks side by side."""
        return torch.cat([w["A"], w["A2"]]), torch.cat([w["B"], w["B2"]], dim=1)


@dataclass(frozen=True)
class Gated:
    """Δ(x) = a(x) B A x + (1 − a(x)) B2 A2 x, [a, 1 − a] = softmax(G x) (FedALT)."""

    name: str = "gated"
    update: str = "Δ(x) = s·(a(x) B A x + (1 − a(x)) B2 A2 x)"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """A (r, d_in), B (d_out, r), A2 and B2 likewise and 0, G (2, d_in)."""
        return {
            **Lora().parts(rank, d_in, d_out),
            "A2": Part(rank, d_in, "zero"),
            "B2": Part(d_out, rank, "zero"),
            "G": Part(2, d_in, "kaiming"),
        }

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """Each token is weighed by itself."""
        own, rest = linear(x, w["G"]).softmax(-1).chunk(2, dim=-1)
        return own * linear(linear(x, w["A"]), w["B"]) + rest * linear(linear(x, w["A2"]), w["B2"])

    def lora(self, w: Tensors) -> None:
        """Which of the two counts depends on x."""


@dataclass(frozen=True)
class Pair:
    """Δ(x) = (1 − b) B (P A x + Q) + b B (P2 A x + Q2), b = sigmoid(G): the client's own and others' (Co-LoRA)."""

    name: str = "pair"
    update: str = "Δ(x) = s·((1 − b) B (P A x + Q) + b B (P2 A x + Q2))"

    def parts(self, rank: int, d_in: int, d_out: int) -> dict[str, Part]:
        """Bases A (r, d_in) and B (d_out, r), orthonormal; P (r, r) and Q (1, r), P2 and Q2 likewise, G (1, 1): 0."""
        return {
            "A": Part(rank, d_in, "rows"),
            "B": Part(d_out, rank, "columns"),
            "P": Part(rank, rank, "zero"),
            "Q": Part(1, rank, "zero"),
            "P2": Part(rank, rank, "zero"),
            "Q2": Part(1, rank, "zero"),
            "G": Part(1, 1, "zero"),
        }

    def delta(self, x: Tensor, w: Tensors) -> Tensor:
        """Between common bases the two adapters are one: B (P̄ A x + Q̄), P̄ = (1 − b) P + b P2 and Q̄ likewise."""
        share = w["G"].sigmoid()
        core, bias = ((1 - share) * w[own] + share * w[others] for own, others in (("P", "P2"), ("Q", "Q2")))
        return linear(linear(linear(x, w["A"]), core, bias.squeeze(-2)), w["B"])

    def lora(self, w: Tensors) -> None:
        """Q is a bias."""
