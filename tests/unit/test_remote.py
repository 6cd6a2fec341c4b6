"""Clients behind a post: who is where, and what is sent again."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import pytest

from celora.core.messages import Instruction, Reply
from celora.engines.remote import ClientFacts, JobStart, Request, Response
from celora.engines.remote_exchange import Remote
from celora.errors import QuorumError
from celora.wire import pack, unpack

BEGIN = JobStart("", "fedit", "sha", b"a, b", ("c0", "c1"))
FACTS = ClientFacts({"train": 5}, b"", None, "data", "sha", "0")
Handle = Callable[[Request], Response | bytes | None]


class Yard:
    """A post whose nodes answer at once, or not at all; a node that is killed forgets what it was sent."""

    def __init__(self) -> None:
        self.handles: dict[int, Handle] = {}
        self.since: dict[int, str] = {}
        self.requests: dict[str, tuple[int, str, bytes]] = {}
        self.sent: list[tuple[int, str]] = []
        self.forgotten: list[str] = []
        self._names, self._times = count(), count()

    def up(self, node: int, handle: Handle) -> None:
        self.handles[node], self.since[node] = handle, str(next(self._times))

    def down(self, node: int) -> None:
        del self.since[node]

    def nodes(self) -> Mapping[int, str]:
        return dict(self.since)

    def send(self, node: int, frame: bytes, seconds: float) -> str:
        name = str(next(self._names))
        self.requests[name] = node, self.since[node], frame
        self.sent.append((node, unpack(Request, frame).kind))
        return name

    def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
        found: dict[str, bytes | str] = {}
        for name in requests:
            node, since, frame = self.requests[name]
            if self.since.get(node) == since and (answer := self.handles[node](unpack(Request, frame))) is not None:
                found[name] = answer if isinstance(answer, bytes) else pack(answer)
        return found

    def forget(self, requests: Sequence[str]) -> None:
        self.forgotten += requests


def site(client: str, reply: str = "", socket: Sequence[tuple[int, int]] = ()) -> Handle:
    """A node that joins and answers orders with its name."""
    counts = iter(socket)

    def handle(call: Request) -> Response:
        body = pack(FACTS) if call.kind == "start" else pack(Reply(b"", {}, f"{client} {reply}".strip()))
        return Response(client, body, None, next(counts, ()))

    return handle


def order(round: int = 1, deadline: float | None = 5.0) -> Instruction:
    return Instruction(round, "train", b"", False, (), deadline)


def remote(yard: Yard, **options: object) -> Remote:
    found = Remote(yard, poll=0.001, **options)  # type: ignore[arg-type]
    return found


def joined(yard: Yard, **options: object) -> Remote:
    found = remote(yard, **options)
    found.start_job("f/job", BEGIN, ("c0", "c1"), 5)
    return found


def two() -> Yard:
    yard = Yard()
    yard.up(1, site("c0"))
    yard.up(2, site("c1"))
    return yard


def test_clients_are_found_by_asking_and_their_orders_reach_them() -> None:
    yard = two()
    far = joined(yard)
    assert far.facts.keys() == {"c0", "c1"} and far.facts["c0"].rows == {"train": 5}
    replies = far({"c0": order(), "c1": order()})
    assert {client: reply.error for client, reply in replies.items()} == {"c0": "c0", "c1": "c1"}
    assert yard.sent.count((1, "start")) == 1


def test_a_job_begins_anew_with_every_node() -> None:
    yard = two()
    far = joined(yard)
    far.start_job("f/other", BEGIN, 2, 5)
    assert yard.sent.count((1, "start")) == yard.sent.count((2, "start")) == 2


def test_a_node_that_comes_back_under_another_id_gets_what_it_still_owes() -> None:
    yard = two()
    far = joined(yard)
    asked: list[Request] = []

    def dies(call: Request) -> None:
        asked.append(call)
        yard.down(1)
        yard.up(7, site("c0", "again"))

    yard.handles[1] = dies
    replies = far({"c0": order(), "c1": order()})
    assert (replies["c0"].error, replies["c1"].error) == ("c0 again", "c1")
    assert len(asked) == 1 and yard.sent[-2:] == [(7, "start"), (7, "instruction")]


def test_a_node_that_restarts_under_the_same_id_is_asked_again() -> None:
    yard = two()
    far = joined(yard)

    def restarts(call: Request) -> None:
        yard.up(1, site("c0", "again"))

    yard.handles[1] = restarts
    assert far({"c0": order()})["c0"].error == "c0 again"
    assert yard.sent[-2:] == [(1, "start"), (1, "instruction")]


def test_the_answer_of_a_node_that_then_leaves_counts() -> None:
    yard = two()
    far = joined(yard)
    last = pack(Response("c0", pack(Reply(b"", {}, "c0, its last")), None, ()))

    class Kept(Yard):
        def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
            if requests and self.since.pop(1, None):
                return {}  # its answer arrives right after somebody looked, and then it goes offline
            return dict.fromkeys(requests, last)

    yard.__class__ = Kept
    assert far({"c0": order()})["c0"].error == "c0, its last"
    assert yard.sent[-1] == (1, "instruction") and 1 not in yard.nodes()


def test_a_node_that_answers_in_anothers_name_loses_the_round_and_is_not_asked_again() -> None:
    yard = two()
    said: list[str] = []
    far = joined(yard, log=said.append)
    yard.handles[1] = lambda call: Response("c1", pack(Reply(b"", {}, "mine")), None, ())
    replies = far({"c0": order(), "c1": order()})
    assert replies["c0"].error == "node 1 speaks for 'c1', expected 'c0': ignored" and replies["c1"].error == "c1"
    assert yard.sent.count((1, "instruction")) == 1 and replies["c0"].error in said


def test_a_node_that_stays_away_is_given_up_after_a_while_and_then_at_once() -> None:
    yard = two()
    far = joined(yard, patience=0.05)
    yard.down(1)
    replies = far({"c0": order(), "c1": order()})
    assert replies["c0"].error == "its node has been gone for 0.05 s" and replies["c1"].error == "c1"
    assert far({"c0": order(2)})["c0"].error == "its node has been gone for 0.05 s"
    yard.up(1, site("c0"))
    assert far({"c0": order(3)})["c0"].error == "c0"


def test_the_deadline_ends_a_round_without_those_that_are_silent() -> None:
    yard = two()
    far = joined(yard)
    yard.handles[1] = lambda call: None
    replies = far({"c0": order(deadline=0.05), "c1": order(deadline=0.05)})
    assert replies.keys() == {"c1"} and len(yard.forgotten) == 1


def test_a_site_that_cannot_take_part_is_named_and_asked_no_more() -> None:
    yard = two()
    yard.handles[2] = lambda call: Response("c1", b"", "DataError: no rows", ())
    said: list[str] = []
    far = joined(yard, log=said.append)
    assert far.facts.keys() == {"c0"} and far.refused == {"c1": "DataError: no rows"}
    assert "c1 cannot take part: DataError: no rows" in said
    assert far({"c1": order()})["c1"].error == "DataError: no rows"


def test_with_keys_a_node_cannot_speak_for_another_client() -> None:
    yard = two()
    yard.up(3, site("c1"))
    said: list[str] = []
    far = remote(yard, names={1: "c0", 2: "c1", 3: "c9"}.get, log=said.append)
    far.start_job("f/job", BEGIN, ("c0", "c1"), 5)
    far({"c0": order()})
    assert any("node 3 speaks for 'c1', expected 'c9': ignored" in text for text in said)
    assert far({"c1": order()})["c1"].error == "c1" and (3, "instruction") not in yard.sent


def test_without_keys_the_first_that_speaks_for_a_client_is_believed() -> None:
    yard = Yard()
    yard.up(1, site("c0"))
    yard.up(3, site("c0", "the second"))
    far = remote(yard)
    far.start_job("f/job", BEGIN, ("c0",), 5)
    assert far({"c0": order()})["c0"].error == "c0"


def test_garbage_costs_its_sender_the_round() -> None:
    yard = two()
    far = joined(yard)
    yard.handles[1] = lambda call: b"celogarbage"
    replies = far({"c0": order(), "c1": order()})
    assert replies["c0"].error is not None and "celo" not in (replies["c1"].error or "")
    yard.handles[1] = lambda call: Response("c0", b"garbage", None, ())
    assert "not a celora frame" in (far({"c0": order(2)})["c0"].error or "")


def test_a_node_whose_carrier_fails_again_and_again_is_left_alone_for_the_round() -> None:
    yard = two()
    far = joined(yard)
    answers, tries = yard.collect, list[str]()

    def failing(requests: Sequence[str]) -> Mapping[str, bytes | str]:
        found = dict(answers(requests))
        for name in [name for name in found if yard.requests[name][0] == 1]:
            kind = unpack(Request, yard.requests[name][2]).kind
            tries.append(kind)
            if kind == "instruction":
                found[name] = "the node crashed"
        return found

    yard.collect = failing  # type: ignore[method-assign]
    replies = far({"c0": order(), "c1": order()})
    assert replies["c1"].error == "c1" and tries == ["instruction", "start", "instruction", "start", "instruction"]
    assert replies["c0"].error == "its node failed 3 times: the node crashed"


def test_bytes_on_sockets_are_those_since_the_last_answer_and_a_new_process_counts_from_zero() -> None:
    yard = Yard()
    yard.up(1, site("c0", socket=[(100, 50), (160, 80), (30, 20)]))
    far = remote(yard)
    far.start_job("f/job", BEGIN, ("c0",), 5)
    assert far.sockets == {"c0": (100, 50)}
    far({"c0": order()})
    assert far.sockets == {"c0": (60, 30)}
    far({"c0": order(2)})
    assert far.sockets == {"c0": (30, 20)}


def test_exports_report_what_did_not_work() -> None:
    yard = two()
    far = joined(yard)
    yard.handles[2] = lambda call: Response("c1", b"", "WireError: there is no model", ())
    assert far.export(("c0", "c1"), "personal@3") == {"c1": "WireError: there is no model"}


def test_if_all_refuse_their_reasons_are_the_error() -> None:
    yard = Yard()
    yard.up(1, lambda call: Response("c0", b"", "c0.Up does not leave this site", ()))
    with pytest.raises(QuorumError, match=r"no site takes part \(c0: c0.Up does not leave this site\). Mend that"):
        remote(yard).start_job("f/job", BEGIN, ("c0",), 5)


def test_a_site_that_begins_one_job_after_another_joins_once() -> None:
    said = list[str]()
    far = joined(two(), log=said.append)
    far.start_job("f/next", BEGIN, ("c0", "c1"), 5)
    assert sum("c0 has joined" in text for text in said) == 1


def test_nobody_at_all_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(QuorumError, match=r"no site has joined within 0.05 s. Start the sites"):
        remote(Yard()).start_job("f/job", BEGIN, ("c0",), 0.05)
