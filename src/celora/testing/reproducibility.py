"""The contract, part 1: what is run again is bit for bit what it was."""

import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from celora.core.client_state import KeptModel, Notes
from celora.core.messages import Checkpoint, Exchange, Instruction, Plan, Reply, Round
from celora.core.solve import solve_together
from celora.engines import embedded
from celora.testing.federation import PLAN, Federation, bits, newest, plan, population_of, record_run, tensors_in
from celora.testing.population import CLIENTS
from celora.testing.variant import Variant
from celora.track.client_stores import ClientStores
from celora.wire import Schema, pack, unpack


def together(federation: Federation, plan: Plan, cohort: int = 3) -> list[Round]:
    """A run in which clients share passes."""
    federation.engine.solve, federation.engine.cohort = solve_together, cohort
    return list(federation.run(plan))


class Reproducibility:
    """Neither chance, order, interruption, nor where states lie changes a run."""

    def test_two_runs_are_bit_equal_whatever_the_global_generators_hold(self, variant: Variant) -> None:
        expected = variant.reference
        kept = torch.random.get_rng_state(), np.random.get_state()
        try:
            torch.manual_seed(12345)
            np.random.seed(12345)
            second = record_run(variant.again())
        finally:
            torch.random.set_rng_state(kept[0])
            np.random.set_state(kept[1])
        assert [bits(rnd) for rnd in second.rounds] == [bits(rnd) for rnd in expected.rounds]
        assert second.stores == expected.stores

    def test_the_order_in_which_clients_are_listed_run_and_heard_changes_nothing(self, variant: Variant) -> None:
        def shuffled(exchange: Exchange) -> Exchange:
            def exchange_shuffled(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
                assert list(orders) == ["c3", "c2", "c1", "c0"]
                replies = exchange(orders)
                return {client: replies[client] for client in ("c1", "c3", "c0", "c2")}

            return exchange_shuffled

        federation = Federation(variant.again(), clients=CLIENTS[::-1])
        assert [bits(rnd) for rnd in federation.run(PLAN, shuffled)] == [bits(r) for r in variant.reference.rounds]
        assert federation.copies() == variant.reference.stores[-1]

    def test_a_run_resumed_from_bytes_is_bit_equal_to_one_that_was_never_stopped(self, variant: Variant) -> None:
        expected = variant.reference
        for done in range(1, PLAN.rounds + 1):
            frame = pack(expected.rounds[done - 1].checkpoint)
            federation = Federation(variant.again(), stores=expected.stores[done - 1])
            rest = list(federation.run(PLAN, checkpoint=unpack(Checkpoint, frame)))
            assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in expected.rounds[done:]]
            assert federation.copies() == expected.stores[-1]

    def test_a_finished_run_has_nothing_to_resume(self, variant: Variant) -> None:
        expected = variant.reference
        federation = Federation(variant.again(), stores=expected.stores[-1])
        assert list(federation.run(PLAN, checkpoint=expected.rounds[-1].checkpoint)) == []

    @pytest.mark.parametrize("room", [0, 1 << 30], ids=["on disk", "in memory"])
    def test_whether_states_and_replies_are_in_memory_or_on_disk_changes_no_bit(
        self, variant: Variant, room: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedded, "REPLIES", room)
        federation = Federation(variant.again())
        federation.stores = federation.engine.stores = ClientStores(None, federation.schema, room)
        assert [bits(rnd) for rnd in federation.run(PLAN)] == [bits(rnd) for rnd in variant.reference.rounds]
        assert federation.copies() == variant.reference.stores[-1]
        frames = [isinstance(value, bytes) for store in federation.stores.values() for value in store.values()]
        assert set(frames) == {room == 0}

    def test_in_process_what_a_client_keeps_is_neither_packed_nor_unpacked(
        self, variant: Variant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed, unpacked = list[type](), list[type]()

        def packing(value: object, *schema: Schema) -> bytes:
            packed.append(type(value))
            return pack(value, *schema)

        def unpacking(kind: Any, *frame: Any) -> Any:
            unpacked.append(kind)
            return unpack(kind, *frame)

        for module in [module for path, module in sys.modules.items() if path.startswith("celora.")]:
            for name, function, counting in (("pack", pack, packing), ("unpack", unpack, unpacking)):
                if vars(module).get(name) is function and module.__name__ != __name__:
                    monkeypatch.setattr(module, name, counting)
        list(Federation(variant.again()).run(PLAN))
        info = variant.algorithm.info
        assert not {info.local, KeptModel, Notes} & {*packed, *unpacked}
        for kind, turns in ((info.down, 3), (info.up, 2)):  # what crosses is built, every time
            assert packed.count(kind) == turns * len(CLIENTS)
            assert unpacked.count(kind) >= turns * len(CLIENTS)

    def test_what_a_store_holds_is_never_changed_and_keeps_nothing_larger_alive(self, variant: Variant) -> None:
        """A view would keep whatever it is a view of: of a state on disk, nothing would be gained."""
        for earlier, later in pairwise(variant.reference.stores):
            for client, store in earlier.items():
                for key in (store.keys() & later[client].keys()) - {"notes"}:
                    assert later[client][key] == store[key], key
        for kept in variant.reference.federation.stores.values():
            for tensor in tensors_in(kept):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes

    @pytest.mark.parametrize("cohort", [1, 3])
    def test_clients_that_share_passes_learn_what_they_learn_alone(self, variant: Variant, cohort: int) -> None:
        """c0 … c3 with 24 … 42 rows: 2 or 3 batches of 16, the last ones of 2 to 14 rows, in pieces of at most 8."""
        federation = Federation(variant.again(), population_of(variant.algorithm))
        rounds, alone = together(federation, PLAN, cohort), variant.reference
        assert max(federation.population.shared.clients) > cohort
        for found, expected in zip(rounds, alone.rounds, strict=True):
            assert (found.heard, found.excluded) == (expected.heard, expected.excluded)
            assert found.traffic == expected.traffic
            for mine, its in zip(tensors_in(found.server), tensors_in(expected.server), strict=True):
                torch.testing.assert_close(mine, its, atol=1e-5, rtol=0, equal_nan=True)
            for client, moments in expected.scores.items():
                for moment, metrics in moments.items():
                    assert found.scores[client][moment] == pytest.approx(metrics, abs=1e-5)
        for client in CLIENTS:
            mine, its = federation.private(federation.stores[client]), alone.private(PLAN.rounds + 1, client)
            for one, other in zip(tensors_in(mine), tensors_in(its), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    def test_sharing_passes_is_reproducible_to_the_bit(self, variant: Variant) -> None:
        first, second = (together(Federation(variant.again()), PLAN) for _ in range(2))
        assert list(map(bits, first)) == list(map(bits, second))

    def test_with_a_fraction_only_the_drawn_train_and_everybody_is_scored(self, variant: Variant) -> None:
        run = record_run(variant.again(), plan=plan(rounds=2, fraction=0.5))
        assert run.rounds[0].heard != run.rounds[1].heard
        for rnd, stores in zip(run.rounds[:2], run.stores, strict=False):
            replies = {client: reply for index, client, reply in run.tape.replies if index == rnd.index}
            assert len(rnd.heard) == 2
            assert list(rnd.scores) == sorted(rnd.scores) == list(CLIENTS)
            before = run.stores[0] if rnd.index == 2 else {}
            for client in CLIENTS:
                assert set(rnd.scores[client]) == {"received", "personal", "train"}
                assert bool(replies[client].frame) == (client in rnd.heard)
                if client not in rnd.heard:
                    earlier = before.get(client, {})
                    assert stores[client].get(newest(stores[client])) == earlier.get(newest(earlier))
