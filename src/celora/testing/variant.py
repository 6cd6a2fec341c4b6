"""An algorithm with its settings, and the runs that the contract looks at, each made once."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pytest

from celora.core.algorithm import AnyAlgorithm
from celora.core.messages import Round
from celora.errors import QuorumError
from celora.testing.federation import PLAN, Federation, Run, lost, plan, population_of, record_run, tensors_in
from celora.testing.population import CLIENTS

HEADS = ("private", "shared", "frozen")
FULL = plan(rounds=2, quorum=4)


class Variant:
    """One way to set an algorithm."""

    def __init__(self, algorithm: AnyAlgorithm) -> None:
        self.algorithm = algorithm

    def again(self) -> AnyAlgorithm:
        """The same algorithm as a new object, so that nothing can be remembered in it."""
        return dataclasses.replace(self.algorithm)  # type: ignore[type-var]

    @cached_property
    def reference(self) -> Run:
        """Two rounds in which all goes well."""
        return record_run(self.algorithm)

    @cached_property
    def troubled(self) -> Run:
        """Three rounds in which c1 is away in round 2, c2 raises in round 2, and c3 never answers."""
        population = population_of(self.algorithm, faults={("c2", 2): RuntimeError("the disk is full")})
        missing = lost(("c1", 2), *(("c3", index) for index in range(1, 5)))
        return record_run(self.again(), population, plan(rounds=3), missing)

    @cached_property
    def diverged(self) -> Run:
        """A run in which the loss of c2 is NaN in round 1."""
        return record_run(self.again(), population_of(self.algorithm, faults={("c2", 1): math.nan}))

    @cached_property
    def stopped(self) -> tuple[Federation, Round, dict[str, dict[str, bytes]]]:
        """A run that its quorum stopped in round 2: with round 1, and the stores as they were after it."""
        federation = Federation(self.again())
        rounds = federation.run(FULL, lost(("c1", 2)))
        first, stores = next(rounds), federation.copies()
        with pytest.raises(QuorumError, match=r"round 2: 3 usable replies, the quorum is 4 \(c1: no reply\)"):
            next(rounds)
        return federation, first, stores

    @property
    def keeps_anything(self) -> bool:
        """Whether a client has come to keep anything private in the course of a run."""
        return any(True for client in CLIENTS for _ in tensors_in(self.reference.private(PLAN.rounds, client)))

    @property
    def sends_anything(self) -> bool:
        """Whether any weight travels."""
        return any(map(self.algorithm.shares, self.reference.federation.schema.entries))


def variants(kind: Callable[..., Any], more: Sequence[Mapping[str, Any]] = ()) -> dict[str, Variant]:
    """The algorithm under every head policy that it accepts, or as it is; and with each of these settings.

    >>> from celora.algorithms.fedit import FedIT
    >>> list(variants(FedIT, [{"head": "private"}]))
    ['private', 'shared', 'frozen', 'more1']
    """
    found: dict[str, Variant] = {}
    for head in HEADS:
        try:
            found[head] = Variant(kind(head=head))
        except (TypeError, ValueError):  # it knows no heads, or not this one; pydantic errors are ValueErrors
            continue
    found = found or {"default": Variant(kind())}
    return found | {f"more{number}": Variant(kind(**settings)) for number, settings in enumerate(more, 1)}
