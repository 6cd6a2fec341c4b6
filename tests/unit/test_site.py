"""celora.site.site: what a site answers, what it keeps, and what does not leave it. One client of the toy world."""

import errno
import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.core.algorithm import AnyAlgorithm
from celora.core.channel import Channel, ChannelState, decode, wire
from celora.core.client_state import kept_models, private_states
from celora.core.messages import Instruction, Plan, Reply
from celora.engines.remote import ClientFacts, JobStart, Request, Response
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise
from celora.site.ledger import Ledger
from celora.site.policy import Policy
from celora.site.site import Site, job_folder
from celora.site.store import SiteStore
from celora.tensors import Tensors
from celora.track.disk import writing
from celora.wire import Schema, pack, unpack
from tests.toy import CLIENTS, Federation, JobContext, Population, Tape, image, population_of, tensors_in

PLAN, JOB = Plan(rounds=2), "fed/job"
BEGIN = JobStart("", "any", "backbone", b"no, yes", CLIENTS)
SECRET = "row 17: Mrs Smith, 47, Leeds"


@dataclass
class Bench:
    """A site and what can be seen of it: what it says, whom it lets in, and what it answers."""

    state: Path
    algorithm: AnyAlgorithm = field(default_factory=FedSALoRA)
    policy: Policy = Policy(floor=1)  # noqa: RUF009  # frozen
    client: str = "c0"
    faults: dict[tuple[str, int], Exception | float] = field(default_factory=dict)
    refuses: Exception | None = None
    sockets: Iterator[tuple[int, ...]] | None = None
    channel: Channel = ()
    said: list[str] = field(default_factory=list)
    entered: list[JobStart] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.population: Population = population_of(self.algorithm, faults=self.faults)
        self.schema = Schema.of(self.population.initial)
        self.ledger = Ledger(self.state / "ledger.jsonl")
        self.site = Site(self.client, self.state, self.policy, self.enter, self.ledger, self.socket, self.said.append)

    def enter(self, begin: JobStart) -> JobContext:
        if self.refuses:
            raise self.refuses
        self.entered.append(begin)
        return JobContext(self.algorithm, self.population, self.client, self.channel)

    def socket(self) -> tuple[int, ...]:
        return next(self.sockets) if self.sockets else ()

    def frame(self, kind: str, body: bytes = b"", job: str = JOB) -> bytes:
        return self.site(pack(Request(job, kind, body)))

    def answer(self, kind: str, body: bytes = b"", job: str = JOB) -> Response:
        return unpack(Response, self.frame(kind, body, job))

    def begin(self, begin: JobStart = BEGIN, job: str = JOB) -> Response:
        return self.answer("start", pack(begin), job)

    def order(self, order: Instruction, job: str = JOB) -> Response:
        return self.answer("instruction", pack(order), job)

    def store(self) -> dict[str, bytes]:
        with SiteStore(self.state / job_folder(self.client, JOB) / "store", self.schema) as store:
            return {name: store[name] for name in store}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def embedded(
    algorithm: AnyAlgorithm, client: str = "c0", channel: Channel = ()
) -> tuple[list[Instruction], list[Reply], dict[str, bytes]]:
    """A client's orders and replies in an embedded run, and its store at the end."""
    federation, tapes = Federation(algorithm, channel=channel), list[Tape]()

    def taped(exchange: Any) -> Tape:
        tapes.append(Tape(exchange))
        return tapes[0]

    list(federation.run(PLAN, taped))
    orders = [order for _, name, order in tapes[0].orders if name == client]
    replies = [reply for _, name, reply in tapes[0].replies if name == client]
    return orders, replies, federation.copies()[client]


# --- what it answers


@pytest.mark.parametrize("algorithm", [FedSALoRA(), CELoRA()], ids=["fedsa-lora", "ce-lora"])
def test_a_site_answers_what_the_client_answers_embedded_and_keeps_the_same(
    algorithm: AnyAlgorithm, state: Path
) -> None:
    orders, replies, store = embedded(algorithm)
    bench = Bench(state, algorithm)
    begun = bench.begin()
    assert (begun.client, begun.error) == ("c0", None)
    assert unpack(ClientFacts, begun.body).rows == {"train": 24, "validation": 20, "test": 20}
    for order, reply in zip(orders, replies, strict=True):
        assert bench.order(order).body == pack(reply)
    assert bench.store() == store
    assert len(bench.entered) == 1 and "fed/job: any, 24 training rows" in bench.said
    assert any(text.startswith("round 1: train, validation 0.") for text in bench.said)
    assert bench.answer("export", b"personal@2").error is None
    assert (state / job_folder("c0", JOB) / "adapter" / "adapter.safetensors").exists()
    assert not bench.site.over
    assert bench.answer("end").error is None and bench.site.over
    assert bench.said[-1] == "fed: the server has finished"


@pytest.mark.parametrize(
    "channel", [(Clip(norm=0.1),), (Clip(norm=0.1), Quantise(bits=8)), (Quantise(bits=4),)], ids=repr
)
@pytest.mark.parametrize("algorithm", [FedSALoRA(), CELoRA()], ids=["fedsa-lora", "ce-lora"])
def test_a_site_applies_the_experiments_filters_as_the_embedded_engine_does(
    algorithm: AnyAlgorithm, channel: Channel, state: Path
) -> None:
    orders, replies, store = embedded(algorithm, channel=channel)
    bench = Bench(state, algorithm, channel=channel)
    bench.begin()
    assert [bench.order(order).body for order in orders] == list(map(pack, replies))
    assert bench.store() == store and "channel@2" in store
    for name in ("channel@1", "channel@2"):
        kept = unpack(ChannelState, store[name], bench.schema)
        assert len(kept.stages) == (Quantise in map(type, channel))
        assert all(note in bench.said for note in kept.notes) and len(kept.notes) == (Clip in map(type, channel))


def test_a_restarted_site_goes_on_with_the_residual_that_the_first_one_kept(state: Path) -> None:
    channel = (Quantise(bits=4),)
    orders, replies, store = embedded(FedSALoRA(), channel=channel)
    first = Bench(state, channel=channel)
    first.begin()
    first.order(orders[0])
    second = Bench(state, channel=channel)
    assert [second.order(order).body for order in (orders[1], orders[1], orders[2])] == [
        pack(replies[1]), pack(replies[1]), pack(replies[2])
    ]  # fmt: skip
    assert second.store() == store


def test_a_question_for_facts_begins_nothing(state: Path) -> None:
    bench = Bench(state)
    assert bench.begin(replace(BEGIN, agreement=b"", clients=())).error is None
    assert not (state / "fed").exists()
    [order, *_], _, _ = embedded(FedSALoRA())
    assert bench.order(order).error == "the job fed/job has not begun at this site"


@pytest.mark.parametrize("round", [0, -1, 10**5000], ids=["0", "-1", "10^5000"])
def test_an_order_for_no_round_is_refused_for_the_ledger_could_not_count_it(round: int, state: Path) -> None:
    [order, *_], _, _ = embedded(FedSALoRA())
    bench = Bench(state)
    bench.begin()
    for task in ("train", "evaluate", "close", "test"):
        refused = bench.order(replace(order, round=round, action=task))
        assert refused.error == "found an instruction for no round, expected one of 1 to 1000000000"
        assert not refused.body
    assert bench.ledger.verify() == [] and len(list(bench.ledger.entries())) == 5
    assert bench.store() == {}


def test_a_restarted_site_takes_part_only_if_its_policy_accepts_the_job_as_it_is_now(state: Path) -> None:
    [order, *_], _, _ = embedded(FedSALoRA())
    Bench(state).begin()
    stricter = Bench(state, policy=Policy(floor=1000))
    error = stricter.order(order).error
    assert error is not None and "fewer training rows than its policy's disclosure.floor" in error


def test_a_restarted_site_goes_on_with_what_the_first_one_kept(state: Path) -> None:
    orders, replies, store = embedded(FedSALoRA())
    first = Bench(state)
    first.begin()
    first.order(orders[0])
    second = Bench(state)
    assert [second.order(order).body for order in orders[1:]] == list(map(pack, replies[1:]))
    assert len(second.entered) == 1 and pack(second.entered[0]) == pack(BEGIN) and second.store() == store


def test_an_order_asked_twice_gets_the_same_bytes_but_for_socket_counts(state: Path) -> None:
    orders, _, store = embedded(FedSALoRA())
    bench = Bench(state)
    bench.begin()
    for order in orders[:2]:
        assert bench.frame("instruction", pack(order)) == bench.frame("instruction", pack(order))
    bench.order(orders[2])
    assert bench.store() == store
    counting = Bench(state, sockets=((n, 2 * n) for n in count(1)))
    first, second = counting.order(orders[2]), counting.order(orders[2])
    assert (first.socket, second.socket) == ((1, 2), (2, 4)) and second.body == first.body


# --- calls that lead nowhere


@pytest.mark.parametrize(
    "job", ["../x/y", "../y", "x/..", "/etc/x", "x/y/z", "x", "", "x/.hidden", "x/y\n", "x\\y/z", "x/" + 101 * "y"]
)
def test_a_job_whose_name_leads_elsewhere_is_refused_and_writes_nothing(job: str, state: Path) -> None:
    bench = Bench(state)
    before = sorted(state.parent.rglob("*"))
    for answer in (bench.begin(job=job), bench.answer("export", b"personal@1", job), bench.answer("end", job=job)):
        assert answer.error == f"found the job {job!r}, expected federation/job of letters, digits, . _ -"
    assert sorted(state.parent.rglob("*")) == before and bench.entered == [] and not bench.site.over


def test_a_client_whose_name_leads_elsewhere_keeps_its_state_here(state: Path) -> None:
    bench = Bench(state, client="../../c0")
    bench.site.enter = lambda begin: JobContext(bench.algorithm, bench.population, "c0")
    assert bench.begin().error is None
    [begun] = state.rglob("start.bin")
    assert begun.relative_to(state) == Path("fed/..-..-c0/job/start.bin")


def test_calls_that_are_unknown_or_garbage_are_named(state: Path) -> None:
    bench = Bench(state)
    assert bench.answer("instruction", pack(Instruction(1, "train", b"", True, (), None))).error == (
        "the job fed/job has not begun at this site"
    )
    assert bench.answer("dance").error == "found a request of kind 'dance': update celora on the older side"
    assert "not a celora frame" in (unpack(Response, bench.site(b"garbage")).error or "")
    bench.begin()
    assert bench.answer("export", b"personal@9").error == "there is no model personal@9 on this site's store"
    assert unpack(Response, bench.site(pack(Request(JOB, "instruction", b"garbage")))).error is not None
    assert bench.said[-1].startswith("failed: ")


# --- what does not leave


def test_words_of_foreign_errors_stay_here_and_their_kind_leaves(state: Path) -> None:
    orders, _, _ = embedded(FedSALoRA())
    bench = Bench(state, faults={("c0", 1): ValueError(SECRET)})
    bench.begin()
    frame = bench.frame("instruction", pack(orders[0]))
    assert unpack(Response, frame).error == "ValueError: see this site's log"
    assert b"Smith" not in frame and f"failed: ValueError: {SECRET}" in bench.said
    assert not private_states(bench.store())
    away = Bench(state.with_name("other"), refuses=KeyError(SECRET))
    frame = away.frame("start", pack(BEGIN))
    assert unpack(Response, frame).error == "KeyError: see this site's log" and b"Smith" not in frame
    assert any(SECRET in text for text in away.said)


def test_words_of_the_policy_leave_and_are_said_here(state: Path) -> None:
    bench = Bench(state, policy=Policy(floor=25))
    error = bench.begin().error or ""
    assert "fewer training rows than its policy's disclosure.floor" in error and "24" not in error
    assert f"not sent: {error}" in bench.said
    assert not (state / "fed").exists()


def windows(tensors: Iterator[torch.Tensor]) -> set[bytes]:
    """All 32 consecutive bytes of these tensors, but for those that repeat one number."""
    found = set()
    for tensor in tensors:
        raw = image(tensor)[3]
        found |= {raw[at : at + 32] for at in range(len(raw) - 31)}
    return {window for window in found if window != window[:4] * 8}


def test_of_a_record_with_a_field_that_may_not_leave_nothing_leaves(state: Path) -> None:
    [order, *_], [reply, *_], _ = embedded(CELoRA())
    leaves = {
        "ce_lora.Up": ("core", "examples"),
        "remote.ClientFacts": ("rows", "baseline", "data", "backbone", "version"),
    }
    leaves |= {"messages.Reply": ("frame", "scores", "error")}
    bench = Bench(state, CELoRA(), Policy(leaves=leaves, floor=1))
    assert "proposal (bytes)" in (bench.begin().error or "")
    bench = Bench(
        state,
        CELoRA(),
        Policy(leaves={**leaves, "remote.ClientFacts": (*leaves["remote.ClientFacts"], "proposal")}, floor=1),
    )
    bench.begin()
    up: Any = unpack(CELoRA.info.up, reply.frame, bench.schema)
    secret = windows(tensors_in(up))
    assert len(secret) > 100
    frame = bench.frame("instruction", pack(order))
    answer = unpack(Response, frame)
    assert answer.body == b"" and "ce_lora.Up does not leave this site: found summary (Mixture)" in (answer.error or "")
    assert not {frame[at : at + 32] for at in range(len(frame) - 31)} & secret
    assert {reply.frame[at : at + 32] for at in range(len(reply.frame) - 31)} >= secret
    assert f"not sent: {answer.error}" in bench.said


def test_a_frame_over_the_budget_does_not_leave(state: Path) -> None:
    [order, *_], _, _ = embedded(FedSALoRA())
    free = Bench(state.with_name("free"))
    free.begin()
    size = len(free.frame("instruction", pack(order)))
    bench = Bench(state, policy=Policy(floor=1, round_bytes=size - 1))
    assert bench.begin().error is None
    answer = bench.order(order)
    assert answer.body == b"" and "its policy's budget.round_bytes" in (answer.error or "")
    assert f"found {size:,} bytes after 0 in round 1" in (answer.error or "")


def test_required_filters_change_what_leaves_and_not_what_is_kept(state: Path) -> None:
    [order, *_], [reply, *_], _ = embedded(FedSALoRA())
    bench = Bench(state, policy=Policy(floor=1, filters=(Clip(norm=1e-3),)))
    bench.begin()
    sent = unpack(Reply, bench.order(order).body)
    mine, its = (unpack(FedSALoRA.info.up, frame, bench.schema).weights for frame in (sent.frame, reply.frame))
    assert _distance(mine, bench.population.initial) < 1.01e-3
    assert _distance(its, bench.population.initial) > 0.1
    assert sent.scores == reply.scores and any("clip" in text for text in bench.said)
    free = Bench(state.with_name("free"))
    free.begin()
    free.order(order)
    assert {name: kept for name, kept in bench.store().items() if name != "channel@1"} == free.store()


def test_a_required_clip_comes_before_the_experiments_quantisation(state: Path) -> None:
    [order, *_], _, _ = embedded(FedSALoRA())
    channel = (Quantise(bits=8),)
    bench = Bench(state, policy=Policy(floor=1, filters=(Clip(norm=1e-3),)), channel=channel)
    bench.begin()
    frame = unpack(Reply, bench.order(order).body).frame
    sent = unpack(FedSALoRA.info.up, frame, wire(channel, bench.schema))
    assert set(sent.weights) == {"layer.A:int8", "layer.A:scale"}
    down, initial = unpack(FedSALoRA.info.down, order.frame, bench.schema), bench.population.initial
    read: Any = decode(channel, sent, down, initial)
    assert 0.9e-3 < _distance(read.weights, initial) < 1.1e-3


def test_a_site_whose_policy_requires_what_the_experiment_lacks_refuses_before_anything_is_trained(state: Path) -> None:
    policy = Policy(floor=1, filters=(Quantise(bits=8),))
    bench = Bench(state, policy=policy)
    assert bench.begin().error == (
        "this site does not take part: its policy requires the filter 'quantise to 8 bits', found none; name it in the "
        "experiment ([[filters]]), or change the policy at the site"
    )
    assert not (state / "fed").exists()
    assert Bench(state, policy=policy, channel=(Quantise(bits=4),)).begin().error is None


def _distance(one: Tensors, other: Tensors) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one) ** 0.5)


def test_what_the_ledger_cannot_record_does_not_leave(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [order, *_], _, _ = embedded(FedSALoRA())
    bench = Bench(state)
    bench.begin()

    def full(**entry: object) -> None:
        with writing(Path("/secret/place/ledger.jsonl")):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bench.ledger, "append", full)
    answer = bench.order(order)
    assert answer.body == b"" and answer.error == "this site cannot keep its state: No space left on device"
    assert "/secret/place" in "".join(bench.said), "where it is, is for the site to know"


# --- what is written down


def test_the_ledger_has_a_line_with_the_hash_of_each_frame_that_left(state: Path) -> None:
    orders, _, _ = embedded(FedSALoRA())
    bench = Bench(state, faults={("c0", 2): ValueError(SECRET)})
    frames = [bench.frame("start", pack(BEGIN)), *(bench.frame("instruction", pack(order)) for order in orders[:2])]
    frames.append(bench.frame("instruction", pack(orders[2])))
    [model, *_] = [model.name for model in kept_models(bench.store())]
    frames += [bench.frame("export", model.encode()), bench.frame("end"), bench.site(b"garbage")]
    entries = list(bench.ledger.entries())
    assert [entry.sha256 for entry in entries] == [hashlib.sha256(frame).hexdigest() for frame in frames]
    assert [entry.bytes for entry in entries] == list(map(len, frames))
    kinds = [
        "remote.ClientFacts",
        "fedsa_lora.Up",
        "error",
        "messages.Reply",
        "remote.Response",
        "remote.Response",
        "error",
    ]
    assert [entry.kind for entry in entries] == kinds
    assert [entry.round for entry in entries] == [0, 1, 2, 3, 0, 0, 0]
    assert {(entry.federation, entry.job, entry.client) for entry in entries[:-1]} == {("fed", "job", "c0")}
    assert bench.ledger.verify() == [] and "Smith" not in bench.ledger.path.read_text()


def test_folders_and_files_are_for_their_owner_alone(state: Path) -> None:
    orders, _, _ = embedded(FedSALoRA())
    state.mkdir(mode=0o755)
    bench = Bench(state)
    bench.begin()
    for order in orders:
        bench.order(order)
    bench.answer("export", next(name for name in bench.store() if name.startswith("personal")).encode())
    found = {path: oct(stat.S_IMODE(path.stat().st_mode)) for path in (state, *state.rglob("*"))}
    assert {path.name for path in found} >= {"start.bin", "private@2.bin", "ledger.jsonl", "adapter"}
    kept = {path: mode for path, mode in found.items() if "adapter" not in path.parts[len(state.parts) :]}
    assert {p: mode for p, mode in kept.items() if mode != ("0o700" if p.is_dir() else "0o600")} == {}


def test_what_a_client_is_told_at_its_site_is_said_there_once_and_does_not_leave(state: Path) -> None:
    algorithm = CELoRA(min_rows=1000)
    orders, _, _ = embedded(algorithm)
    bench = Bench(state, algorithm)
    bench.begin()
    frames = [bench.frame("instruction", pack(order)) for order in orders]
    note = "no class reaches the disclosure floor: this client is known by its core alone"
    assert bench.said.count(note) == 1
    assert not any(b"disclosure" in frame for frame in frames)
