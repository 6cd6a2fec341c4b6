"""The contract, part 2: clients that are away, fail or diverge cost themselves a round and nobody else anything."""

import math

from celora.testing.federation import Federation, bits, image, tensors_in
from celora.testing.population import CLIENTS
from celora.testing.variant import FULL, Variant


class Faults:
    """Clients that do not deliver."""

    def test_a_client_missing_in_a_round_is_excluded_with_a_reason_and_heard_again_later(
        self, variant: Variant
    ) -> None:
        rounds = variant.troubled.rounds
        assert [rnd.excluded.get("c1") for rnd in rounds] == [None, "no reply", None, None]
        assert ["c1" in rnd.heard for rnd in rounds] == [True, False, True, False]
        assert ["c1" in rnd.scores for rnd in rounds] == [True, False, True, True]

    def test_a_client_that_raises_is_excluded_with_its_error_and_heard_again_later(self, variant: Variant) -> None:
        rounds = variant.troubled.rounds
        assert [rnd.excluded.get("c2") for rnd in rounds] == [None, "RuntimeError: the disk is full", None, None]
        assert ["c2" in rnd.heard for rnd in rounds] == [True, False, True, False]

    def test_a_client_that_never_answers_leaves_the_others_a_run(self, variant: Variant) -> None:
        rounds = variant.troubled.rounds
        assert [rnd.heard for rnd in rounds] == [("c0", "c1", "c2"), ("c0",), ("c0", "c1", "c2"), ()]
        assert all(rnd.excluded["c3"] == "no reply" for rnd in rounds)
        assert sorted(rounds[-1].scores) == ["c0", "c1", "c2"]

    def test_a_client_that_was_away_or_failed_keeps_its_last_good_state(self, variant: Variant) -> None:
        """A client that trained has another one, if it has any; it may have its first one only now."""
        run = variant.troubled
        for client, trained in (("c0", True), ("c1", False), ("c2", False)):
            moved = image(run.private(1, client)) != image(run.private(2, client))
            assert moved <= trained
            assert moved or not (trained and variant.keeps_anything)

    def test_nan_from_one_client_is_named_and_reaches_no_other(self, variant: Variant) -> None:
        first, _, last = variant.diverged.rounds
        if variant.sends_anything:
            assert "NaN or infinity" in first.excluded["c2"]
        assert all(bool(t.isfinite().all()) for rnd in (first, last) for t in tensors_in(rnd.server))
        for client in ("c0", "c1", "c3"):
            assert math.isfinite(last.scores[client]["received"]["loss"])

    def test_a_loss_of_nan_costs_its_client_a_round_and_no_more(self, variant: Variant) -> None:
        _, second, last = variant.diverged.rounds
        assert second.heard == CLIENTS
        assert all(math.isfinite(second.scores["c2"][moment]["loss"]) for moment in ("received", "personal", "train"))
        assert math.isfinite(last.scores["c2"]["received"]["loss"])

    def test_below_the_quorum_the_run_stops_names_who_failed_and_can_be_resumed_bit_equal(
        self, variant: Variant
    ) -> None:
        """From the checkpoint and the stores of the round before, as a run folder keeps them."""
        _, first, stores = variant.stopped
        rest = Federation(variant.again(), stores=stores).run(FULL, checkpoint=first.checkpoint)
        assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in variant.reference.rounds[1:]]

    def test_a_round_stopped_by_its_quorum_leaves_no_trace_on_the_stores(self, variant: Variant) -> None:
        """A client on another machine has only the store it has: repeating the round must not train it twice."""
        federation, first, _ = variant.stopped
        rest = Federation(variant.again(), stores=federation.stores).run(FULL, checkpoint=first.checkpoint)
        assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in variant.reference.rounds[1:]]
