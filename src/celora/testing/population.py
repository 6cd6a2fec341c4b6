"""Four clients that train in milliseconds: a two-layer net of which one layer is adapted, and their own rows.

    h = tanh(x W0ᵀ + s·Δ(x)),   logits = h headᵀ + bias          W0 (8, 6), A (4, 6), C (4, 4), B (8, 4)

`Toy` implements `celora.core.learner.Learner`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.core.adapters import Family, modules, truncated
from celora.core.learner import Batch, Metrics, Recipe, Split
from celora.rng import generator
from celora.tensors import Tensors

CLIENTS = ("c0", "c1", "c2", "c3")
D_IN, D_OUT, RANK, CLASSES = 6, 8, 4, 2
SCALE = 2.0
RECIPE = Recipe(**dict[str, Any](lr=4e-2, batch_size=16))


class Population:
    """What `Embedded` asks for: a client's learner in a round.

    Args:
        family: of the adapter.
        b: "zero", or "random" where the bases are to be frozen.
        faults: (client, round) -> an exception that the client's loss raises there, or a factor of its loss.
        ranks: of the clients that have one of their own.
        classes: whether the learners tell the classes of their rows.

    Attributes:
        reads: (client, split) -> how often the rows of that split were read.
    """

    def __init__(
        self,
        family: Family,
        *,
        recipe: Recipe = RECIPE,
        seed: int = 0,
        b: str = "zero",
        faults: Mapping[tuple[str, int], Exception | float] | None = None,
        ranks: Mapping[str, int] | None = None,
        classes: bool = True,
    ) -> None:
        self.classes = classes
        self.recipe, self.seed, self.faults, self.ranks = recipe, seed, faults or {}, ranks or {}
        self.reads: Counter[tuple[str, str]] = Counter()
        draw = generator(seed, "initial")
        self.backbone = torch.randn(D_OUT, D_IN, generator=draw) / 2
        bases = torch.randn(RANK, D_IN, generator=draw), torch.randn(D_OUT, RANK, generator=draw) / 4
        self.family = family
        self.initial: dict[str, Tensor] = {}
        for letter, part in family.parts(RANK, D_IN, D_OUT).items():
            shape, drawn = (part.rows, part.columns), generator(seed, "initial", letter)
            match part.draw:
                case "down":
                    start = bases[0] if letter == "A" else torch.randn(shape, generator=drawn)
                case "up" if b == "random":
                    start = bases[1]
                case "rows" | "columns" | "kaiming":
                    start = torch.randn(shape, generator=drawn) / 2
                case "core" | "identity":
                    start = torch.eye(part.rows)
                case "one":
                    start = torch.ones(shape)
                case _:
                    start = torch.zeros(shape)
            self.initial[f"layer.{letter}"] = start
        self.initial["head.weight"] = torch.randn(CLASSES, D_OUT, generator=draw) / 3
        self.initial["head.bias"] = torch.randn(CLASSES, generator=draw) / 3
        self.shared = Together()

    def __call__(self, client: str, round: int) -> "Toy":
        return Toy(self, client, round)

    def rows(self, client: str, split: Split) -> tuple[Tensor, Tensor]:
        """Inputs (n, 6) and classes (n,): x₀ decides, and another coordinate, the client's own, has a say."""
        self.reads[client, split] += 1
        own = int(client[1:])
        draw = generator(self.seed, "rows", client, split)
        x = torch.randn(24 + 6 * own if split == "train" else 20, D_IN, generator=draw)
        return x, (x[:, 0] + 0.7 * x[:, 1 + own % (D_IN - 1)] > 0).long()


class Together:
    """What the learners of one world share: a row is one token, `y` is -100 where there is none."""

    capacity = 64

    def __init__(self) -> None:
        self.clients: list[int] = []  # in each pass of several, for tests that ask whether there was one

    def count(self, batch: Batch) -> int:
        return len(batch["y"])

    def size(self, batch: Batch) -> tuple[int, int]:
        return len(batch["y"]), 1

    def cut(self, batch: Batch) -> list[Batch]:
        """In pieces of eight rows."""
        x, y = (torch.split(batch[name], 8) for name in ("x", "y"))
        return [{"x": rows, "y": labels} for rows, labels in zip(x, y, strict=True)]

    def join(self, batches: Sequence[Batch]) -> Batch:
        self.clients.append(len(batches))
        most = max(len(batch["y"]) for batch in batches)
        more = [most - len(batch["y"]) for batch in batches]
        x = [F.pad(batch["x"], (0, 0, 0, n)) for batch, n in zip(batches, more, strict=True)]
        y = [F.pad(batch["y"], (0, n), value=-100) for batch, n in zip(batches, more, strict=True)]
        return {"x": torch.stack(x), "y": torch.stack(y)}

    def scores(self, asked: Sequence[tuple[Any, Tensors, Split, int | None]]) -> list[Metrics]:
        return [learner.test(weights, split, rows) for learner, weights, split, rows in asked]

    def features(self, learners: Sequence[Any]) -> list[tuple[Tensor, Tensor | None]]:
        return [learner.features() for learner in learners]


class Toy:
    """One client of a `Population` in one round."""

    device = torch.device("cpu")

    def __init__(self, population: Population, client: str, round: int) -> None:
        self.population, self.client, self.round = population, client, round
        self.recipe, self.initial, self.shared = population.recipe, population.initial, population.shared
        if client in population.ranks:
            self.initial = truncated(population.initial, population.ranks[client])
        self.rng = generator(population.seed, "algorithm", client, round)
        self.order = generator(population.seed, "fit", client, round)
        self.examples = 24 + 6 * int(client[1:])

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """Each call draws another order, as a `ModelLearner`'s."""
        x, y = self.population.rows(self.client, "train")
        made, steps = 0, self.recipe.steps if size is None else None
        for _ in range(1 if size else self.recipe.epochs if steps is None else steps):
            for rows in torch.split(torch.randperm(len(x), generator=self.order), size or self.recipe.batch_size):
                if made == steps:
                    return
                made += 1
                yield {"x": x[rows], "y": y[rows]}

    def hidden(self, weights: Tensors, x: Tensor) -> Tensor:
        parts = modules(weights)["layer"]
        many = next((len(w) for w in parts.values() if w.dim() == 3), None)
        rows = x if many is None else x.expand(many, *x.shape[-2:]).flatten(0, 1)
        delta = self.population.family.delta(rows, parts)
        return torch.tanh(
            x @ self.population.backbone.to(x.dtype).mT
            + SCALE * (delta if many is None else delta.view(many, -1, D_OUT))
        )

    def logits(self, weights: Tensors, x: Tensor) -> Tensor:
        return self.hidden(weights, x) @ weights["head.weight"].mT + weights["head.bias"].unsqueeze(-2)

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        fault = self.population.faults.get((self.client, self.round), 1.0)
        if isinstance(fault, Exception):
            raise fault
        logits = self.logits(weights, batch["x"])
        loss = F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten(), reduction="none", ignore_index=-100)
        return fault * loss.view(batch["y"].shape).sum(-1) / (batch["y"] >= 0).sum(-1)

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        x, y = (part[:rows] for part in self.population.rows(self.client, split))
        logits = self.logits(weights, x)
        right = (logits.argmax(-1) == y).double().mean()
        return {"score": float(right), "loss": float(F.cross_entropy(logits, y)), "rows": float(len(y))}

    def features(self) -> tuple[Tensor, Tensor | None]:
        x, y = self.population.rows(self.client, "train")
        return torch.tanh(x @ self.population.backbone.mT), y if self.population.classes else None

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        return {"layer": self.population.rows(self.client, "train")[0][:rows].norm(dim=0)}
