"""What an algorithm sends at MiniLM's size, measured in frames that were really built."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from celora.core.adapters import Family
from celora.core.learner import Batch
from celora.core.messages import Plan, Round
from celora.core.rounds import run_rounds
from celora.engines.embedded import Embedded
from celora.wire import Schema
from tests.toy import Stub, pretend

LAYERS, RANK, DIM, CLASSES = 12, 8, 384, 3
"""Query and value of six layers, at rank 8, of MiniLM."""
HEAD = (DIM + 1) * CLASSES * 4


def weights(family: Family) -> dict[str, Tensor]:
    """All weights of an adapter of 12 matrices, and a head."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for layer in range(LAYERS // 2):
        for matrix in ("query", "value"):
            name = f"encoder.layer.{layer}.attention.self.{matrix}"
            for letter, part in family.parts(RANK, DIM, DIM).items():
                found[f"{name}.{letter}"] = torch.randn(part.rows, part.columns, generator=draw)
    return {**found, "head.weight": torch.zeros(CLASSES, DIM), "head.bias": torch.zeros(CLASSES)}


class Worker(Stub):
    """A stub with mini-batches, for methods that ask for gradients."""

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        return iter([{}, {}])


def rounds(algorithm: Any, clients: str = "ab") -> list[Round]:
    """Two rounds and the closing one, of clients with 40 rows that end their training where they start."""
    initial = weights(algorithm.family)

    def population(client: str, round: int) -> Stub:
        draw = torch.Generator().manual_seed(ord(client))
        return Worker(initial, 40, (torch.randn(40, DIM, generator=draw), torch.arange(40) % 2))

    engine = Embedded(algorithm, population, {}, Schema.of(initial), pretend)
    return list(run_rounds(algorithm, engine, Plan(rounds=2), clients, initial))
