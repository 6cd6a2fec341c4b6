"""celora.engines.embedded: clients in this process, and nothing but frames between."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from celora.algorithms.fedit import FedIT
from celora.algorithms.fedsa_lora import Down, FedSALoRA, Local, Up
from celora.core.adapters import Lora
from celora.core.messages import Exchange, Instruction, Plan, Reply
from celora.core.solve import solve
from celora.engines import embedded
from celora.engines.embedded import Embedded, Replies
from celora.errors import DataError, QuorumError, RunFolderError
from celora.wire import pack, unpack
from tests.toy import CLIENTS, Federation, Population, image


def order(round: int = 1, task: str = "train", **changes: Any) -> Instruction:
    fields: dict[str, Any] = {"frame": b"", "evaluate": False, "keep": (), "deadline": None}
    return Instruction(round, task, **{**fields, **changes})


def down(federation: Federation) -> bytes:
    return pack(Down({}), federation.schema)


def test_replies_are_frames_and_private_state_is_handed_over_as_it_is() -> None:
    federation = Federation(FedSALoRA())
    replies = federation.engine({"c0": order(frame=down(federation))})
    assert list(replies) == ["c0"]
    assert sorted(unpack(Up, replies["c0"].frame, federation.schema).weights) == ["layer.A"]
    assert list(federation.stores) == ["c0"]
    assert {key: type(value) for key, value in federation.stores["c0"].items()} == {"private@1": Local}


def test_a_client_that_raises_answers_with_the_error_and_the_others_are_run() -> None:
    federation = Federation(FedSALoRA(), Population(Lora(), faults={("c1", 1): ZeroDivisionError("no rows")}))
    replies = federation.engine({client: order(frame=down(federation)) for client in CLIENTS})
    assert replies["c1"].error == "ZeroDivisionError: no rows"
    assert (replies["c1"].frame, replies["c1"].scores) == (b"", {})
    assert [client for client, reply in replies.items() if reply.frame] == ["c0", "c2", "c3"]
    assert "c1" not in federation.stores


def test_an_order_that_cannot_be_read_is_answered_with_what_is_wrong_with_it() -> None:
    federation = Federation(FedSALoRA())
    reply = federation.engine({"c0": order(frame=b"garbage")})["c0"]
    assert reply.error is not None
    assert reply.error.startswith("WireError: not a celora frame: found b'garb'")


def test_a_private_state_that_cannot_be_read_is_told_and_left_as_it_is() -> None:
    """Starting afresh in silence would throw a client's training away."""
    federation = Federation(FedSALoRA(), stores={"c0": {"private@0": b"celo\x01 torn"}})
    reply = federation.engine({"c0": order(frame=down(federation))})["c0"]
    assert "WireError" in str(reply.error)
    assert federation.stores["c0"]["private@0"] == b"celo\x01 torn"


def test_a_client_whose_world_cannot_be_built_is_a_client_that_did_not_deliver() -> None:
    population = Population(Lora())

    def fragile(client: str, round: int) -> Any:
        if client == "c1":
            raise DataError("rows.csv is gone")
        return population(client, round)

    federation = Federation(FedSALoRA())
    engine = Embedded(federation.algorithm, fragile, {}, federation.schema)
    replies = engine({client: order(frame=down(federation)) for client in CLIENTS})
    assert replies["c1"].error == "DataError: rows.csv is gone"
    assert all(replies[client].frame for client in ("c0", "c2", "c3"))


def test_clients_are_run_in_the_order_of_the_orders() -> None:
    federation, met = Federation(FedSALoRA()), []

    def watching(jobs: Any) -> Any:
        met.extend(learner.client for learner, _ in jobs)
        return solve(jobs)

    engine = Embedded(federation.algorithm, federation.population, {}, federation.schema, watching)
    engine({client: order(frame=down(federation)) for client in ("c2", "c0", "c1")})
    assert met == ["c2", "c0", "c1"]


class Clock:
    """Time that passes only while a client trains."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        return self.now

    def solve(self, jobs: Any) -> Any:
        self.now += self.seconds
        return solve(jobs)


@pytest.mark.parametrize(("deadline", "delivered"), [(None, 4), (100.0, 4), (25.0, 3), (15.0, 2), (5.0, 1)])
def test_after_the_deadline_no_further_client_is_started(
    deadline: float | None, delivered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds a client; one that was started in time is waited for."""
    clock, federation = Clock(10.0), Federation(FedSALoRA())
    monkeypatch.setattr(embedded, "time", clock)
    engine = Embedded(federation.algorithm, federation.population, {}, federation.schema, clock.solve)
    replies = engine({client: order(frame=down(federation), deadline=deadline) for client in CLIENTS})
    assert list(replies) == list(CLIENTS[:delivered])


def test_in_a_run_a_missed_deadline_is_a_reason_and_may_break_the_quorum(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, federation = Clock(10.0), Federation(FedIT())
    monkeypatch.setattr(embedded, "time", clock)
    federation.engine.solve = clock.solve
    first = next(federation.run(Plan(rounds=1, deadline=15.0)))
    assert first.heard == ("c0", "c1")
    assert dict(first.excluded) == {"c2": "no reply within 15 s", "c3": "no reply within 15 s"}
    with pytest.raises(QuorumError, match="2 usable replies, the quorum is 3"):
        next(federation.run(Plan(rounds=1, deadline=15.0, quorum=3)))


def test_an_order_and_a_reply_survive_a_real_wire() -> None:
    """Packing both ways changes no bit of a run: nothing else passes between server and client."""

    def wired(exchange: Exchange) -> Exchange:
        def over_the_wire(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = exchange({client: unpack(Instruction, pack(order)) for client, order in orders.items()})
            return {client: unpack(Reply, pack(reply)) for client, reply in replies.items()}

        return over_the_wire

    plain, wire = (list(Federation(FedSALoRA()).run(Plan(rounds=2), *around)) for around in ((), (wired,)))
    assert [image((r.checkpoint, r.scores)) for r in plain] == [image((r.checkpoint, r.scores)) for r in wire]


def test_an_error_that_quotes_a_name_which_is_not_unicode_is_still_one_clients_error() -> None:
    """A file name that is not UTF-8 reaches Python with lone surrogates in it."""
    federation = Federation(FedIT(), Population(Lora(), faults={("c1", 1): ValueError("cannot read caf\udce9.csv")}))
    first = next(federation.run(Plan(rounds=1)))
    assert first.heard == ("c0", "c2", "c3")
    assert first.excluded["c1"].startswith("ValueError: cannot read caf")


def test_beyond_their_room_replies_lie_in_a_file_and_come_back_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "REPLIES", 10)
    replies, sent = Replies(), {f"c{i}": Reply(bytes([i]) * i, {"train": {"loss": float(i)}}, None) for i in range(8)}
    for client, reply in sent.items():
        replies.add(client, reply)
    assert list(replies) == list(sent) and len(replies) == 8
    for client in ["c7", "c0", "c5", "c7", "c2"]:
        assert image(replies[client]) == image(sent[client])
    assert "c8" not in replies and replies.get("c8") is None
    held = sum(len(reply.frame) for reply in replies._replies.values())
    assert held <= 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_replies_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "REPLIES", 0)
    monkeypatch.setattr(embedded.tempfile, "TemporaryFile", partial(open, "/dev/full", "w+b", buffering=0))
    with pytest.raises(RunFolderError, match=r"a temporary file in .*: No space left on device; free some space"):
        Replies().add("c0", Reply(b"frame", {}, None))


def test_a_turn_that_fails_leaves_the_shelf_as_it_was() -> None:
    population = Population(Lora(), faults={("c0", 2): ZeroDivisionError("no rows")})
    federation = Federation(FedSALoRA(), population)
    federation.engine({"c0": order(frame=down(federation), evaluate=True)})
    before = federation.copies()
    reply = federation.engine({"c0": order(2, frame=down(federation), evaluate=True)})["c0"]
    assert reply.error == "ZeroDivisionError: no rows"
    assert federation.copies() == before
