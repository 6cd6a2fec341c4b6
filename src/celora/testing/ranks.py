"""The contract, part 5, of algorithms whose `info` says `mixed_ranks`: clients of unlike rank."""

import math
from typing import Any

import pytest

from celora.core.client_state import KeptModel, unpacked
from celora.tensors import Tensors, part
from celora.testing.federation import PLAN, Federation, bits, lost, plan, population_of, record_run
from celora.testing.population import CLIENTS, Population
from celora.testing.reproducibility import together
from celora.testing.travel import named_tensors
from celora.testing.variant import Variant
from celora.wire import unpack

RANKS = dict(zip(CLIENTS, (1, 3, 2, 4), strict=True))


def unlike(variant: Variant, **options: Any) -> Population:
    """Clients of these ranks."""
    return population_of(variant.algorithm, ranks=RANKS, **options)


def ranks_in(weights: Tensors) -> dict[str, int]:
    """The rank of each A and B."""
    return {n: len(w) if part(n) == "A" else w.shape[1] for n, w in weights.items() if part(n) in ("A", "B")}


class MixedRanks:
    """c0 … c3 at ranks 1, 3, 2 and 4."""

    def test_each_client_trains_predicts_and_sends_at_its_own_rank_or_below(self, mixed: Variant) -> None:
        run, algorithm = record_run(mixed.again(), unlike(mixed)), mixed.algorithm
        assert [rnd.heard for rnd in run.rounds] == [CLIENTS, CLIENTS, ()]
        assert not any(rnd.excluded for rnd in run.rounds)
        for _, client, reply in run.tape.replies:
            for model in ("received@1", "personal@2"):
                weights = unpacked(KeptModel, run.stores[-1][client][model], run.federation.schema).weights
                assert max(ranks_in(weights).values()) <= RANKS[client]
            if reply.frame:
                up: Any = unpack(algorithm.info.up, reply.frame, run.federation.schema)
                for sent in named_tensors(up):
                    assert max(ranks_in(sent or {}).values(), default=0) <= RANKS[client]

    def test_unlike_ranks_survive_clients_that_are_away_fail_or_never_answer(self, mixed: Variant) -> None:
        """c3, the only one of the largest rank, is never heard, and c0, of the smallest, joins late."""
        population = unlike(mixed, faults={("c2", 2): RuntimeError("the disk is full")})
        gone = lost(("c0", 1), ("c0", 2), ("c1", 3), *(("c3", index) for index in range(1, 4)))
        run = record_run(mixed.again(), population, plan(rounds=4), gone)
        assert [rnd.heard for rnd in run.rounds] == [("c1", "c2"), ("c1",), ("c0", "c2"), CLIENTS, ()]
        losses = [score["received"]["loss"] for score in run.rounds[-1].scores.values()]
        assert len(losses) == len(CLIENTS)
        assert all(map(math.isfinite, losses))

    def test_with_unlike_ranks_sharing_passes_and_resuming_change_nothing(self, mixed: Variant) -> None:
        expected = record_run(mixed.again(), unlike(mixed))
        federation = Federation(mixed.again(), unlike(mixed), stores=expected.stores[0])
        rest = list(federation.run(PLAN, checkpoint=expected.rounds[0].checkpoint))
        assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in expected.rounds[1:]]
        for found, alone in zip(together(Federation(mixed.again(), unlike(mixed)), PLAN), expected.rounds, strict=True):
            for client, moments in alone.scores.items():
                for moment, metrics in moments.items():
                    assert found.scores[client][moment] == pytest.approx(metrics, abs=1e-5)
