"""Columns of low-rank factors A that travel encrypted while the rest travels in clear.

    list      for each module, columns in an order that all agree on, in code: the server reads none of it
    budget    the share of a module's d_in columns that a client hides: the first k of the list, at least one
    hidden    A', columns permuted so that the list comes last, its first at the very end, and those k are 0;
              E = Enc(B a_c),  c ∈ list[:k], of all modules in common ciphertexts
    revealed  factors of P + M, where B A' is P, and Dec(E) the columns of M

Whoever has no secret sees how many columns are hidden, and not which. SHE-LoRA (arXiv 2505.21051) says what is hidden;
what is laid out otherwise than there, and why, is in celora.algorithms.she_lora.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from celora.core.adapters import modules
from celora.lazy import Tensor, torch
from celora.privacy import ckks
from celora.privacy.order import Code
from celora.tensors import Tensors

LEVELS = 1 << 12
"""Scores are told to a 64th of a factor of 2, from 2⁻³² to 2³²."""


def wish(secret: bytes, module: str, scores: Tensor, budget: float) -> Tensor:
    """The columns of the highest scores (d_in,), the highest first, and these scores, in code: (2, k) int64."""
    best = scores.sort(descending=True, stable=True).indices[: hidden_count(budget, len(scores))]
    levels = (64 * scores[best].clamp(min=1e-30).log2()).round().long() + LEVELS // 2
    told = Code(secret, "scores", LEVELS).encode(levels.clamp(0, LEVELS - 1))
    return torch.stack([Code(secret, module, len(scores)).encode(best), told])


@dataclass(frozen=True)
class AgreedColumns:
    """Each module's columns in the agreed order, read with the clients' secret."""

    secret: bytes
    lists: Mapping[str, Tensor]

    @classmethod
    def read(cls, secret: bytes, agreed: Sequence[Tensor], weights: Tensors) -> "AgreedColumns":
        """From the codes (n,) for each module of an adapter, in the order of the modules' names.

        Raises:
            ValueError: if something is no code of this secret, or there are lists of more modules, or fewer.
        """
        adapted = sorted(modules(weights).items())
        lists = {
            module: Code(secret, module, w["A"].shape[1]).decode(codes)
            for (module, w), codes in zip(adapted, agreed, strict=True)
        }
        return cls(secret, lists)

    def hide(self, weights: Tensors, budget: float) -> tuple[Tensors, tuple[bytes, ...]]:
        """What travels instead of an adapter's weights: B and A', and E.

        Raises:
            ImportError: without the extra `he`.
        """
        sent, adapted = dict(weights), modules(weights)
        numbers = [
            adapted[module]["B"].double() @ adapted[module]["A"][:, self.lists[module][at]].double()
            for module, at in entries(self.lists, adapted, budget)
        ]
        for module, w in adapted.items():
            columns, d_in = self.lists[module], w["A"].shape[1]
            sent[f"{module}.A"] = w["A"][:, permutation(columns, d_in)]
            sent[f"{module}.A"][:, d_in - min(hidden_count(budget, d_in), len(columns)) :] = 0
        return sent, ckks.encrypt(self.secret, torch.cat(numbers))

    def reveal(self, weights: Tensors, cipher: Sequence[bytes], budget: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> B (d_out, r + k) and A (r + k, d_in), float64, whose product is P + M; `budget` is what E covers.

        Raises:
            ImportError: without the extra `he`.
            ValueError: if a frame is no ciphertext.
        """
        adapted = modules(weights)
        columns: dict[str, list[Tensor]] = {module: [] for module in adapted}
        numbers = ckks.decrypt(self.secret, cipher)
        for module, _ in entries(self.lists, adapted, budget):
            column, numbers = numbers.tensor_split([len(adapted[module]["B"])])
            columns[module].append(column[:, None])
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for module, w in adapted.items():
            d_in, hidden = w["A"].shape[1], self.lists[module][: len(columns[module])]
            a = w["A"].double()[:, permutation(self.lists[module], d_in).argsort()]
            factors = [a, torch.eye(d_in, dtype=torch.float64)[hidden]]
            found[module] = torch.cat([w["B"].double(), *columns[module]], dim=1), torch.cat(factors)
        return found


def hidden_count(budget: float, d_in: int) -> int:
    """How many columns a budget hides."""
    return max(1, int(budget * d_in + 1e-9))


def entries(
    lists: Mapping[str, Tensor], adapted: Mapping[str, Mapping[str, Tensor]], budget: float
) -> list[tuple[str, int]]:
    """(module, place in its list) of what a budget hides, in the order of the ciphertexts' numbers.

    The entries of a smaller budget are the first ones of a larger: ciphertexts of all clients add up in place.
    """
    found = [
        ((at + 1) / adapted[module]["A"].shape[1] if at else 0.0, module, at)
        for module, columns in lists.items()
        for at in range(min(len(columns), hidden_count(budget, adapted[module]["A"].shape[1])))
    ]
    return [(module, at) for _, module, at in sorted(found)]


def permutation(last: Tensor, size: int) -> Tensor:
    """Positions 0 … size − 1 in a new order: those not in `last` as they are, then `last`, its first at the end."""
    rest = torch.ones(size, dtype=torch.bool)
    rest[last] = False
    return torch.cat([rest.nonzero().flatten(), last.flip(0)])
