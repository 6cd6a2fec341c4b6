"""FLoRA: an exact sum at any ranks, and a downlink that grows with the clients (methods.md 12; part V, 1, 2 and 11)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.flora import FLoRA, Up
from celora.core.aggregation import Heard
from celora.core.client_state import KeptModel, unpacked
from celora.core.messages import Exchange, Instruction, Plan, Reply
from celora.wire import unpack
from tests.facts.payloads import HEAD, rounds
from tests.toy import Federation, Tape, lost, newest

D_IN, D_OUT, N, RANKS = 12, 10, (3, 1, 6), (2, 3, 4)
SIZE, W = 12 * 8 * (384 + 384) * 4, 12 * 384 * 384 * 4
"""Bytes of A and B, and of W, of 12 matrices at r = 8 and d = 384: 294,912 and 7,077,888."""


def drawn(rank: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, D_IN, generator=draw, dtype=torch.float64)
    return {"layer.A": a, "layer.B": torch.randn(D_OUT, rank, generator=draw, dtype=torch.float64)}


def test_up_goes_what_fedit_sends_and_down_the_stack_of_all() -> None:
    for clients in ("ab", "abcd"):
        first, second, closing = (rnd.traffic["a"] for rnd in rounds(FLoRA(), clients))
        assert (first.up_payload, first.down_payload) == (SIZE, 0)
        assert (second.up_payload, second.down_payload) == (SIZE, len(clients) * SIZE)
        assert (closing.up_payload, closing.down_payload) == (0, len(clients) * SIZE)
        assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_from_24_clients_on_w_would_be_smaller_than_the_stack() -> None:
    """Not made use of: the paper sends the stack. Here r = 8 and d = 384."""
    assert (SIZE, W) == (294_912, 7_077_888)
    assert 24 * SIZE == W


def test_the_sum_is_exact_at_any_ranks_round_after_round() -> None:
    algorithm = FLoRA(head="frozen")
    server = algorithm.server_init({}, ())
    wanted = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for index in range(3):
        clients = [drawn(rank, 10 * index + seed) for seed, rank in enumerate(RANKS)]
        for n, w in zip(N, clients, strict=True):
            wanted += n / sum(N) * w["layer.B"] @ w["layer.A"]
        ups = {str(i): Up(w, n) for i, (w, n) in enumerate(zip(clients, N, strict=True))}
        server = algorithm.aggregate(server, Heard(ups))
        found = server.base.merged.total["layer.W"]
        assert float((found - wanted).norm() / wanted.norm()) < 1e-14
    assert server.base.last["layer.W"].a.shape == (sum(RANKS), D_IN)


def test_every_client_starts_every_round_from_a_new_a_and_b_0() -> None:
    seen: list[Tensor] = []

    class Watching(FLoRA):
        def train(self, learner: Any, local: Any, down: Any) -> Any:
            steps = FLoRA.train(self, learner, local, down)
            problem = next(steps)
            seen.append(problem.weights["layer.A"])
            assert not problem.weights["layer.B"].any()
            try:
                answer = yield problem
                steps.send(answer)
            except StopIteration as stop:
                return stop.value

    federation = Federation(Watching())
    list(federation.run(Plan(rounds=2)))
    entries = federation.population.initial["layer.A"].flatten().sort().values
    assert len(seen) == 8
    assert all(torch.equal(a.flatten().sort().values, entries) for a in seen)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def unread(*replies: tuple[str, int]) -> Any:
    """An `Exchange` on which these (client, round) train and are not heard."""

    def around(exchange: Exchange) -> Exchange:
        def exchange_without(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            found = exchange(orders)
            return {c: r if (c, orders[c].round) not in replies else replace(r, frame=b"?") for c, r in found.items()}

        return exchange_without

    return around


@pytest.mark.parametrize("trouble", [lost, unread], ids=["did not train", "trained and was not heard"])
def test_all_clients_have_the_same_w_to_the_bit_whoever_missed_what(trouble: Any) -> None:
    """c1 is missing in rounds 1, 2 and 4, c2 in round 3: W after every download is the server's."""
    missing = [("c1", 1), ("c1", 2), ("c2", 3), ("c1", 4)]
    federation, before = Federation(FLoRA()), torch.zeros(0)
    for rnd in federation.run(Plan(rounds=5), trouble(*missing)):
        models = [
            unpacked(KeptModel, store[name], federation.schema).weights["layer.W"]
            for store in federation.stores.values()
            if (name := f"received@{rnd.index - 1}") in store
        ]
        assert len(models) == 4 - (trouble is lost and any(r == rnd.index for _, r in missing))
        if rnd.index > 1:
            assert all(torch.equal(w, before) for w in models)
        before = rnd.server.base.merged.total["layer.W"]


def test_who_is_one_stack_behind_is_sent_the_stack_and_others_w() -> None:
    federation, tapes = Federation(FLoRA()), list[Tape]()

    def taped(exchange: Exchange) -> Exchange:
        tapes.append(Tape(lost(("c1", 2))(exchange)))
        return tapes[0]

    list(federation.run(Plan(rounds=3), taped))
    downs = {(i, c): unpack(FLoRA.info.down, o.frame, federation.schema).base for i, c, o in tapes[0].orders}
    whole = {at for at, base in downs.items() if base.total}
    assert whole == {(3, "c1")}
    assert all(bool(base.last) != bool(base.total) for (index, _), base in downs.items() if index > 1)


def test_a_client_that_lost_its_state_sits_out_one_round_and_is_back_in_the_next() -> None:
    federation = Federation(FLoRA())
    seen = []
    for rnd in federation.run(Plan(rounds=4)):
        seen.append(rnd)
        if rnd.index == 2:
            federation.stores["c1"] = {}
    assert "found W of version 0 here, expected 1" in seen[2].excluded["c1"]
    assert ["c1" in rnd.heard for rnd in seen] == [True, True, False, True, False]
    assert newest(federation.stores["c1"]) == "private@4"
