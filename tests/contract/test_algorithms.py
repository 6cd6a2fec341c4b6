"""What every algorithm in `ALGORITHMS` promises, under every head policy that it accepts.

A new algorithm is covered by its line in the table. `MORE` adds settings that take other paths through a file.
"""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from celora.algorithms import ALGORITHMS
from celora.algorithms.fedit import FedIT
from celora.algorithms.fedsa_lora import FedSALoRA
from celora.core.aggregation import Heard
from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.messages import Checkpoint, Exchange, Instruction, KeptModel, Notes, Plan, Reply, Round, unpacked
from celora.core.problems import Fit
from celora.core.solve import solve, solve_together
from celora.engines import embedded
from celora.errors import QuorumError, WireError
from celora.tensors import Names, Tensors, mean, only, part
from celora.track.client_stores import ClientStores
from celora.wire import Schema, pack, unpack
from tests.toy import CLIENTS, Federation, Population, Tape, image, lost, newest, population_of, tensors_in

HEADS = ("private", "shared", "frozen")
MORE: Mapping[str, list[dict[str, Any]]] = {
    "ce-lora": [
        {"rule": "uniform", "by_rows": True, "self_weight": "excluded"},
        {"rule": "reset", "head": "shared"},
        {"rule": "permuted"},
        {"combination": "product", "normalise": "softmax", "cka_of": "C", "components": 1},
        {"freeze_bases": True, "self_weight": "fixed", "kernel": "inverse", "components": 1},
    ],
    "fed-hello": [
        {"allocation": "bottleneck", "randomised": True},
        {"allocation": "uniform", "tiers": (1.0,), "head": "private"},
        {"first": 2, "every": 1, "fim_rows": 3},
    ],
    "she-lora": [
        {"budget": (0.2, 0.5, 1.0), "merge": "score", "head": "private"},
        {"sensitivity": "code", "budget": (0.4,), "calibration": 5},
    ],
    "fedex-lora": [{"rank": 2}],
    "hetlora": [
        {"lam": 0.3, "gamma": 0.5, "weighting": "all"},
        {"pruning": False},
    ],
    "ravan": [
        {"train_heads": 1, "choose": "random"},
        {"heads": 2, "train_heads": 1, "choose": "norm", "head": "private"},
        {"heads": 3, "train_heads": 2, "choose": "gradient", "head": "frozen"},
    ],
    "fed-sb": [
        {"start": "random"},
        {"start": "gradient", "eta": 1e-2},
        {"start": "gradient", "head": "private", "batches": 1},
    ],
    "pfedme": [{"beta": 1.5, "inner_steps": 2, "lam": 3.0, "eta": 0.1}],
    "fedalt": [{"by_rows": True, "head": "shared"}],
    "fedmosaic": [{"coordinates": 5, "memory": 0, "noise": 0.01, "temperature": 0.5}, {"batches": 1, "memory": 1}],
    "fdlora": [{"sync": "train", "sync_every": 1, "budget": 5}, {"sync_every": 1, "momentum": 0.9, "outer_lr": 0.7}],
    "pf2lora": [{"zeta": "same", "divisor": 4, "head": "private"}, {"first_order": True}],
    "per-fedavg": [{"variant": "HF", "adapt": 3}],
}


def _variants() -> Iterator[tuple[str, AnyAlgorithm]]:
    for name, kind in ALGORITHMS.items():
        for head in HEADS:
            try:
                yield f"{name}-{head}", kind(head=head)
            except ValidationError:
                continue  # test_a_refused_head_policy_is_refused_with_the_ones_that_are_allowed
        for number, fields in enumerate(MORE.get(name, []), 1):
            yield f"{name}-more{number}", kind(**fields)


VARIANTS = dict(_variants())
PLAN = Plan(rounds=2)
every_algorithm = pytest.mark.parametrize("name", VARIANTS)


@dataclasses.dataclass(frozen=True)
class Run:
    """An uninterrupted run: its rounds, all that crossed, and the stores after each round."""

    federation: Federation
    rounds: tuple[Round, ...]
    tape: Tape
    stores: tuple[dict[str, dict[str, bytes]], ...]


def record_run(
    algorithm: AnyAlgorithm,
    population: Population | None = None,
    plan: Plan = PLAN,
    around: Callable[[Exchange], Exchange] = lambda exchange: exchange,
) -> Run:
    federation, tapes = Federation(algorithm, population), list[Tape]()

    def taped(exchange: Exchange) -> Exchange:
        tapes.append(Tape(around(exchange)))
        return tapes[0]

    pairs = [(rnd, federation.copies()) for rnd in federation.run(plan, taped)]
    return Run(federation, tuple(rnd for rnd, _ in pairs), tapes[0], tuple(stores for _, stores in pairs))


@cache
def reference(name: str) -> Run:
    return record_run(VARIANTS[name])


def again(name: str) -> AnyAlgorithm:
    """The same algorithm as a new object, so that nothing can be remembered in it."""
    return dataclasses.replace(VARIANTS[name])  # type: ignore[type-var]


def bits(rnd: Round) -> Any:
    """All of a round that must be reproducible, to the last bit."""
    facts = (rnd.index, rnd.heard, dict(rnd.excluded), rnd.scores, rnd.server, rnd.checkpoint)
    return image(facts), {client: dataclasses.astuple(t) for client, t in rnd.traffic.items()}


def private(run: Run, index: int, client: str) -> Any:
    """A client's private state after a round."""
    return run.federation.private(run.stores[index - 1][client])


def has_private_state(name: str) -> bool:
    """Whether a client has come to keep anything in the course of a run."""
    return bool([t for client in CLIENTS for t in tensors_in(private(reference(name), PLAN.rounds, client))])


def sends_anything(name: str) -> bool:
    return any(map(VARIANTS[name].shares, reference(name).federation.schema.entries))


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_accepts_a_head_policy_and_its_defaults(name: str) -> None:
    assert any(variant.startswith(f"{name}-") for variant in VARIANTS)
    assert ALGORITHMS[name]().head in HEADS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_refused_head_policy_is_refused_with_the_ones_that_are_allowed(name: str) -> None:
    for head in (*HEADS, "borrowed"):
        if f"{name}-{head}" not in VARIANTS:
            with pytest.raises(ValidationError, match=r"'private'.*'frozen'"):
                ALGORITHMS[name](head=head)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALGORITHMS[name]().head = "private"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_four_records_of_the_card_are_frozen_dataclasses_told_apart_on_the_wire(name: str) -> None:
    info = ALGORITHMS[name].info
    kinds = [info.server, info.local, info.down, info.up]
    assert len(set(kinds)) == 4
    for kind in kinds:
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


# --- reproducibility ----------------------------------------------------------------------------------------------


@every_algorithm
def test_two_runs_are_bit_equal_whatever_the_global_generators_hold(name: str) -> None:
    expected = reference(name)
    kept = torch.random.get_rng_state(), np.random.get_state()
    try:
        torch.manual_seed(12345)
        np.random.seed(12345)
        second = record_run(again(name))
    finally:
        torch.random.set_rng_state(kept[0])
        np.random.set_state(kept[1])
    assert [bits(rnd) for rnd in second.rounds] == [bits(rnd) for rnd in expected.rounds]
    assert second.stores == expected.stores


@every_algorithm
def test_the_order_in_which_clients_are_listed_run_and_heard_changes_nothing(name: str) -> None:
    def shuffled(exchange: Exchange) -> Exchange:
        def exchange_shuffled(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            assert list(orders) == ["c3", "c2", "c1", "c0"]
            replies = exchange(orders)
            return {client: replies[client] for client in ("c1", "c3", "c0", "c2")}

        return exchange_shuffled

    federation = Federation(again(name), clients=CLIENTS[::-1])
    assert [bits(rnd) for rnd in federation.run(PLAN, shuffled)] == [bits(rnd) for rnd in reference(name).rounds]
    assert federation.copies() == reference(name).stores[-1]


@every_algorithm
def test_a_run_resumed_from_bytes_is_bit_equal_to_one_that_was_never_stopped(name: str) -> None:
    expected = reference(name)
    for done in range(1, PLAN.rounds + 1):
        frame = pack(expected.rounds[done - 1].checkpoint)
        federation = Federation(again(name), stores=expected.stores[done - 1])
        rest = list(federation.run(PLAN, checkpoint=unpack(Checkpoint, frame)))
        assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in expected.rounds[done:]]
        assert federation.copies() == expected.stores[-1]


@every_algorithm
def test_a_finished_run_has_nothing_to_resume(name: str) -> None:
    expected = reference(name)
    federation = Federation(again(name), stores=expected.stores[-1])
    assert list(federation.run(PLAN, checkpoint=expected.rounds[-1].checkpoint)) == []


# --- where states are ---------------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("room", [0, 1 << 30], ids=["on disk", "in memory"])
def test_whether_states_and_replies_are_in_memory_or_on_disk_changes_no_bit(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "REPLIES", room)
    federation = Federation(again(name))
    federation.stores = federation.engine.stores = ClientStores(None, federation.schema, room)
    assert [bits(rnd) for rnd in federation.run(PLAN)] == [bits(rnd) for rnd in reference(name).rounds]
    assert federation.copies() == reference(name).stores[-1]
    frames = [isinstance(value, bytes) for store in federation.stores.values() for value in store.values()]
    assert set(frames) == {room == 0}


@every_algorithm
def test_in_process_what_a_client_keeps_is_neither_packed_nor_unpacked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, unpacked = list[type](), list[type]()

    def packing(value: object, *schema: Schema) -> bytes:
        packed.append(type(value))
        return pack(value, *schema)

    def unpacking(kind: Any, *frame: Any) -> Any:
        unpacked.append(kind)
        return unpack(kind, *frame)

    for module in [module for path, module in sys.modules.items() if path.startswith("celora.")]:
        for function, counting in ((pack, packing), (unpack, unpacking)):
            if getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, counting)
    list(Federation(again(name)).run(PLAN))
    info = VARIANTS[name].info
    assert not {info.local, KeptModel, Notes} & {*packed, *unpacked}
    for kind, turns in ((info.down, 3), (info.up, 2)):  # what crosses is built, every time
        assert packed.count(kind) == turns * len(CLIENTS)
        assert unpacked.count(kind) >= turns * len(CLIENTS)


@every_algorithm
def test_what_is_on_a_shelf_is_never_changed_and_keeps_nothing_larger_alive(name: str) -> None:
    """A view would keep whatever it is a view of: of a state on disk, nothing would be gained."""
    for earlier, later in pairwise(reference(name).stores):
        for client, store in earlier.items():
            for key in (store.keys() & later[client].keys()) - {"notes"}:
                assert later[client][key] == store[key], key
    for kept in reference(name).federation.stores.values():
        for tensor in tensors_in(kept):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


# --- clients that do not deliver ----------------------------------------------------------------------------------


@cache
def troubled(name: str) -> Run:
    """Three rounds in which c1 is away in round 2, c2 raises in round 2, and c3 never answers."""
    algorithm = again(name)
    population = population_of(algorithm, faults={("c2", 2): RuntimeError("the disk is full")})
    return record_run(algorithm, population, Plan(rounds=3), lost(("c1", 2), *(("c3", index) for index in range(1, 5))))


@every_algorithm
def test_a_client_missing_in_a_round_is_excluded_with_a_reason_and_heard_again_later(name: str) -> None:
    rounds = troubled(name).rounds
    assert [rnd.excluded.get("c1") for rnd in rounds] == [None, "no reply", None, None]
    assert ["c1" in rnd.heard for rnd in rounds] == [True, False, True, False]
    assert ["c1" in rnd.scores for rnd in rounds] == [True, False, True, True]


@every_algorithm
def test_a_client_that_raises_is_excluded_with_its_error_and_heard_again_later(name: str) -> None:
    rounds = troubled(name).rounds
    assert [rnd.excluded.get("c2") for rnd in rounds] == [None, "RuntimeError: the disk is full", None, None]
    assert ["c2" in rnd.heard for rnd in rounds] == [True, False, True, False]


@every_algorithm
def test_a_client_that_never_answers_leaves_the_others_a_run(name: str) -> None:
    rounds = troubled(name).rounds
    assert [rnd.heard for rnd in rounds] == [("c0", "c1", "c2"), ("c0",), ("c0", "c1", "c2"), ()]
    assert all(rnd.excluded["c3"] == "no reply" for rnd in rounds)
    assert sorted(rounds[-1].scores) == ["c0", "c1", "c2"]


@every_algorithm
def test_a_client_that_was_away_or_failed_keeps_its_last_good_state(name: str) -> None:
    """A client that trained has another one, if it has any; it may have its first one only now."""
    run = troubled(name)
    for client, trained in (("c0", True), ("c1", False), ("c2", False)):
        moved = image(private(run, 1, client)) != image(private(run, 2, client))
        assert moved <= trained
        assert moved or not (trained and has_private_state(name))


@cache
def diverged(name: str) -> Run:
    """A run in which the loss of c2 is NaN in round 1."""
    return record_run(again(name), population_of(again(name), faults={("c2", 1): math.nan}))


@every_algorithm
def test_nan_from_one_client_is_named_and_reaches_no_other(name: str) -> None:
    first, _, last = diverged(name).rounds
    if sends_anything(name):
        assert "NaN or infinity" in first.excluded["c2"]
    assert all(bool(t.isfinite().all()) for rnd in (first, last) for t in tensors_in(rnd.server))
    for client in ("c0", "c1", "c3"):
        assert math.isfinite(last.scores[client]["received"]["loss"])


@every_algorithm
def test_a_loss_of_nan_costs_its_client_a_round_and_no_more(name: str) -> None:
    _, second, last = diverged(name).rounds
    assert second.heard == CLIENTS
    assert all(math.isfinite(second.scores["c2"][moment]["loss"]) for moment in ("received", "personal", "train"))
    assert math.isfinite(last.scores["c2"]["received"]["loss"])


FULL = Plan(rounds=2, quorum=4)


@cache
def stopped(name: str) -> tuple[Federation, Round, dict[str, dict[str, bytes]]]:
    """A run that its quorum stopped in round 2: with round 1, and the stores as they were after it."""
    federation = Federation(again(name))
    rounds = federation.run(FULL, lost(("c1", 2)))
    first, stores = next(rounds), federation.copies()
    with pytest.raises(QuorumError, match=r"round 2: 3 usable replies, the quorum is 4 \(c1: no reply\)"):
        next(rounds)
    return federation, first, stores


@every_algorithm
def test_below_the_quorum_the_run_stops_names_who_failed_and_can_be_resumed_bit_equal(name: str) -> None:
    """From the checkpoint and the stores of the round before, as a run folder keeps them."""
    _, first, stores = stopped(name)
    rest = Federation(again(name), stores=stores).run(FULL, checkpoint=first.checkpoint)
    assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in reference(name).rounds[1:]]


@every_algorithm
def test_a_round_stopped_by_its_quorum_leaves_no_trace_on_the_shelves(name: str) -> None:
    """A client on another machine has only the store it has: repeating the round must not train it twice."""
    federation, first, _ = stopped(name)
    rest = Federation(again(name), stores=federation.stores).run(FULL, checkpoint=first.checkpoint)
    assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in reference(name).rounds[1:]]


# --- purity -------------------------------------------------------------------------------------------------------


class Changed(AssertionError):
    """An argument is not what it was."""


class Watched:
    """An algorithm whose six methods are checked to leave their arguments, and the algorithm, as they were."""

    def __init__(self, inner: AnyAlgorithm) -> None:
        self.inner, self.info, self.head = inner, inner.info, inner.head
        self.family, self.shares, self.calls = inner.family, inner.shares, set[str]()

    def _unchanged(self, method: str, before: Any, *now: object) -> None:
        self.calls.add(method)
        if before != image((self.inner, *now)):
            raise Changed(method)

    def _call(self, method: str, *arguments: object) -> Any:
        before = image((self.inner, *map(_visible, arguments)))
        value = getattr(self.inner, method)(*arguments)
        self._unchanged(method, before, *map(_visible, arguments))
        return value

    def server_init(self, weights: Tensors, clients: Any) -> Any:
        return self._call("server_init", weights, clients)

    def client_init(self, learner: Any) -> Any:
        return self._call("client_init", learner)

    def send(self, server: Any, client: str) -> Any:
        return self._call("send", server, client)

    def aggregate(self, server: Any, heard: Any) -> Any:
        ups = dict(heard._sent.items())  # `heard` itself may give a new value each time
        before = image((self.inner, server, ups))
        value = self.inner.aggregate(server, Heard(ups, self.info.aggregation))
        self._unchanged("aggregate", before, server, ups)
        return value

    def model(self, local: Any, down: Any) -> Any:
        return self._call("model", local, down)

    def train(self, learner: Any, local: Any, down: Any) -> Any:
        arguments = [_visible(learner), local, down]
        before = image((self.inner, *arguments))
        trained = yield from self._fits(self.inner.train(learner, local, down))
        self._unchanged("train", before, *arguments)
        return trained

    def _fits(self, steps: Any) -> Any:
        """Every answer that is handed in is an argument, too."""
        problem = next(steps)
        while True:
            answer = yield problem
            before = image((self.inner, answer))
            try:
                problem = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            finally:
                self._unchanged("train", before, answer)


def _visible(argument: object) -> object:
    """What of an argument can be changed: of a learner, the weights everybody starts from."""
    return getattr(argument, "initial", argument)


@every_algorithm
def test_no_method_changes_its_arguments(name: str) -> None:
    watched = Watched(again(name))
    rounds = list(Federation(watched, population_of(watched.inner)).run(PLAN))
    assert not any(rnd.excluded for rnd in rounds)
    assert image(rounds[-1].server) == image(reference(name).rounds[-1].server)
    assert watched.calls == {"server_init", "client_init", "send", "train", "aggregate", "model"}


class Scribbling(FedIT):
    """FedIT that averages into the first reply."""

    def aggregate(self, server: Any, heard: Any) -> Any:
        first, *others = (up for _, up in heard._sent.items())
        for name, tensor in first.weights.items():
            tensor.copy_(mean((up.weights, 1) for up in (first, *others))[name])
        return dataclasses.replace(server, weights=first.weights)


def test_a_method_that_writes_into_its_argument_is_noticed() -> None:
    with pytest.raises(Changed, match="aggregate"):
        list(Federation(Watched(Scribbling())).run(PLAN))


# --- what the server reads of the replies ------------------------------------------------------------------------

READ_TWICE = ("she-lora",)
"""Algorithms whose server reads replies twice: a ciphertext can be weighted once, and its weight is a share of all."""


@every_algorithm
def test_the_server_reads_what_the_card_says_and_unpacks_each_reply_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm, read, unpacked = again(name), set[str](), Counter[int]()

    def unpacking(kind: Any, frame: bytes, *schema: Any) -> Any:
        unpacked[id(frame)] += kind is algorithm.info.up
        return unpack(kind, frame, *schema)

    def noted(reading: str) -> None:
        method = getattr(Heard, reading)
        monkeypatch.setattr(Heard, reading, lambda heard, *how: (read.add(reading), method(heard, *how))[1])

    noted("mean")
    noted("each")
    monkeypatch.setattr("celora.core.rounds.unpack", unpacking)
    run = record_run(algorithm)  # its tape holds all frames, so that no two have one id
    assert read == (set() if name.startswith("local") else {algorithm.info.aggregation})
    often = [unpacked[id(reply.frame)] for _, _, reply in run.tape.replies if reply.frame]
    assert set(often) == ({1, 2} if name.startswith(READ_TWICE) else {1})
    assert sum(often) == sum(unpacked.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stage_changes_what_is_averaged_and_is_refused_where_each_reply_is_read(name: str) -> None:
    algorithm, calls = ALGORITHMS[name](), list[str]()

    def one_more(average: Tensors) -> Tensors:
        calls.append("stage")
        return {name: w + 1 for name, w in average.items()}

    def around(engine: Exchange) -> Exchange:
        return lambda orders: (calls.append("exchange"), engine(orders))[1]

    plan = Plan(rounds=1)
    staged = Federation(algorithm).run(plan, around, stage=one_more)
    if algorithm.info.aggregation == "each":
        with pytest.raises(ValueError, match=f"a stage for the means of {type(algorithm).__name__}.*no stage"):
            next(staged)
        assert calls == []
        return
    one, other = next(staged), next(Federation(algorithm).run(plan))
    averages = name != "local"
    assert calls == ["exchange", "stage"][: 1 + averages]
    assert (image(one.server) != image(other.server)) == averages


# --- one client or many in a pass -------------------------------------------------------------------------------


def together(federation: Federation, plan: Plan, cohort: int = 3) -> list[Round]:
    federation.engine.solve, federation.engine.cohort = solve_together, cohort
    return list(federation.run(plan))


@every_algorithm
@pytest.mark.parametrize("cohort", [1, 3])
def test_clients_that_share_passes_learn_what_they_learn_alone(name: str, cohort: int) -> None:
    """c0 … c3 with 24 … 42 rows: 2 or 3 batches of 16, the last ones of 2 to 14 rows, in pieces of at most 8."""
    federation = Federation(again(name), population_of(VARIANTS[name]))
    rounds, alone = together(federation, PLAN, cohort), reference(name)
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
        mine, its = federation.private(federation.stores[client]), private(alone, PLAN.rounds + 1, client)
        for one, other in zip(tensors_in(mine), tensors_in(its), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@every_algorithm
def test_sharing_passes_is_reproducible_to_the_bit(name: str) -> None:
    first, second = (together(Federation(again(name), population_of(VARIANTS[name])), PLAN) for _ in range(2))
    assert list(map(bits, first)) == list(map(bits, second))


# --- what travels -------------------------------------------------------------------------------------------------


def private_bytes_that_travel(run: Run, public: tuple[str, ...] = (), sent: tuple[str, ...] = ()) -> list[str]:
    """Where 32 consecutive bytes of a tensor of any client's `Local` cross, at whatever offset, in whatever round.

    All that crosses is searched: orders and replies whole, so frames, scores and errors alike. A tensor of fewer than
    32 bytes is searched for whole. Windows that repeat one number (the zeros of a B that has not moved) are left out:
    they are the seed's, and tell nothing of a client. The fields in `public` came down: they are searched for in what
    goes up. Those in `sent` went up: they are searched for in what comes down.
    """
    up = [pack(reply) for _, _, reply in run.tape.replies]
    down = [pack(order) for _, _, order in run.tape.orders]
    assert sum(map(len, down + up)) > sum(len(reply.frame) for _, _, reply in run.tape.replies) > 0
    found: list[str] = []
    for searched, crossed in (
        (lambda field: field not in public + sent, down + up),
        (lambda field: field in public, up),
        (lambda field: field in sent, down),
    ):
        wanted: dict[bytes, str] = {}
        for index, stores in enumerate(run.stores, 1):
            for client, store in stores.items():
                local = run.federation.private(store)
                kept = [getattr(local, field.name) for field in dataclasses.fields(local) if searched(field.name)]
                for tensor in (tensor for value in kept for tensor in tensors_in(value)):
                    raw, number = image(tensor)[3], tensor.element_size()
                    size = min(32, len(raw))
                    for at in range(len(raw) - size + 1):
                        window = raw[at : at + size]
                        if window != (window[:number] * size)[:size]:
                            wanted[window] = f"{client} round {index} {tuple(tensor.shape)} byte {at}"
        for size in {len(window) for window in wanted}:
            for message in crossed:
                there = {message[at : at + size] for at in range(len(message) - size + 1)}
                found += sorted(wanted[window] for window in there & wanted.keys())
    return found


PUBLIC: Mapping[str, tuple[str, ...]] = {"rolora": ("frozen",), "fed-sb": ("bases",)}
"""Algorithm -> the fields of its `Local` that hold what the server sent to everybody: a copy, kept to save a download.
They are private in nothing but where they lie, so they may come down again, to a client that lacks them."""

SENT: Mapping[str, tuple[str, ...]] = {"fdlora": ("personal",), "fedalt": ("own",), "fedmosaic": ("own",)}
"""Algorithm -> the fields of its `Local` that hold what the client itself has sent, and that no other may get."""


def public(name: str) -> tuple[str, ...]:
    """The public fields of a variant's `Local`."""
    return PUBLIC.get(name.rpartition("-")[0], ())


def sent(name: str) -> tuple[str, ...]:
    """The fields of a variant's `Local` that were sent."""
    return SENT.get(name.rpartition("-")[0], ())


@every_algorithm
def test_no_32_bytes_of_a_private_tensor_are_in_anything_that_crosses(name: str) -> None:
    assert private_bytes_that_travel(reference(name), public(name), sent(name)) == []


@pytest.mark.parametrize("name", [name for name in VARIANTS if sent(name)])
def test_what_is_said_to_be_sent_is(name: str) -> None:
    """Otherwise the list would hide what need not be hidden."""
    assert private_bytes_that_travel(reference(name))


@pytest.mark.parametrize("name", [name for name in VARIANTS if public(name)])
def test_what_is_called_public_is_the_same_at_every_client(name: str) -> None:
    for index in range(1, PLAN.rounds + 1):
        for field in public(name):
            first, *others = [image(getattr(private(reference(name), index, client), field)) for client in CLIENTS]
            assert all(other == first for other in others)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("local", "fedsa", "ce-lora"))])
def test_there_is_private_state_to_look_for(name: str) -> None:
    assert has_private_state(name)


class Leaking(FedSALoRA):
    """FedSA-LoRA that sends the B it says it keeps."""

    @property
    def shares(self) -> Names:
        return only("A", "B")


class Whispering(FedSALoRA):
    """FedSA-LoRA that hides nine numbers of its head among those of A."""

    def train(self, learner: Any, local: Any, down: Any) -> Any:
        trained = yield from FedSALoRA.train(self, learner, local, down)
        sent = {name: tensor.clone() for name, tensor in trained.up.weights.items()}
        sent["layer.A"].view(-1)[7:16] = trained.local.mine["head.weight"].view(-1)[3:12]
        return Trained(trained.local, dataclasses.replace(trained.up, weights=sent), trained.model)


@pytest.mark.parametrize("public", [(), ("mine",)], ids=["private", "public"])
def test_a_private_tensor_that_is_sent_is_found(public: tuple[str, ...]) -> None:
    """Even one that may come down."""
    found = private_bytes_that_travel(record_run(Leaking()), public)
    assert {line.split()[0] for line in found} == set(CLIENTS)
    assert all("(8, 4)" in line for line in found)


def test_nine_private_numbers_among_others_are_found() -> None:
    found = private_bytes_that_travel(record_run(Whispering()))
    assert {line.split()[0] for line in found} == set(CLIENTS)
    assert any("(2, 8) byte 12" in line for line in found)


def is_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, torch.Tensor) for item in value.values())


@every_algorithm
def test_a_reply_holds_exactly_the_names_that_the_algorithm_says_it_shares(name: str) -> None:
    algorithm, run = VARIANTS[name], reference(name)
    shared = {n for n in run.federation.population.initial if algorithm.shares(n)}
    ups = [
        unpack(algorithm.info.up, reply.frame, run.federation.schema) for _, _, reply in run.tape.replies if reply.frame
    ]
    assert len(ups) == PLAN.rounds * len(CLIENTS)
    for up in ups:
        fields = [getattr(up, f.name) for f in dataclasses.fields(up)]
        sent = [set(value) for value in fields if is_tensors(value)]
        if algorithm.info.partial:
            assert all(names and names <= shared for names in sent)
        else:
            nothing_yet = getattr(up, "weights", {}) is None  # told apart from a reply that lacks something
            assert sent == ([shared] if shared and not nothing_yet else [])


@every_algorithm
def test_a_model_holds_known_names_in_their_shapes_and_no_others(name: str) -> None:
    algorithm, run = VARIANTS[name], reference(name)
    downs = {(index, client): order.frame for index, client, order in run.tape.orders}
    for index in range(2, PLAN.rounds + 2):
        for client in CLIENTS:
            down = unpack(algorithm.info.down, downs[index, client], run.federation.schema)
            model, schema = algorithm.model(private(run, index - 1, client), down), run.federation.schema
            assert schema.names(model) if algorithm.info.mixed_ranks else schema.covers(model)


@every_algorithm
def test_the_four_records_come_back_from_the_wire_as_they_went(name: str) -> None:
    algorithm, run = VARIANTS[name], reference(name)
    schema, info = run.federation.schema, algorithm.info
    frames = {
        info.server: [rnd.checkpoint.server for rnd in run.rounds],
        info.local: [store[newest(store)] for stores in run.stores for store in stores.values()],
        info.down: [order.frame for _, _, order in run.tape.orders],
        info.up: [reply.frame for _, _, reply in run.tape.replies if reply.frame],
    }
    for kind, packed in frames.items():
        for frame in packed:
            value = unpack(kind, frame, schema)
            assert pack(value, schema) == frame
            assert image(unpack(kind, pack(value), Schema({}))) == image(value)
            for other in frames.keys() - {kind}:
                with pytest.raises(WireError, match=r"found a frame of kind \w+\.\w+, expected"):
                    unpack(other, frame, schema)
    for rnd in run.rounds:
        assert image(unpack(info.server, rnd.checkpoint.server, schema)) == image(rnd.server)


@every_algorithm
def test_before_training_every_client_predicts_with_the_weights_of_the_seed(name: str) -> None:
    """So ΔW = 0 at first, wherever the adapter is drawn with B = 0."""
    federation = Federation(again(name))
    algorithm, initial = federation.algorithm, federation.population.initial
    server = algorithm.server_init(initial, CLIENTS)
    for client in CLIENTS:
        learner = federation.population(client, 1)
        model = {**initial, **algorithm.model(algorithm.client_init(learner), algorithm.send(server, client))}
        assert image(model) == image(initial)


def noting(steps: Any, learner: Any, found: set[str]) -> Any:
    """A turn that notes the names it asks to train, or to have gradients of."""
    try:
        problem = next(steps)
        while True:
            names = problem.train if isinstance(problem, Fit) else getattr(problem, "names", lambda name: False)
            found |= {name for name in learner.initial if names(name)}
            answer = yield problem
            problem = steps.send(answer)
    except StopIteration as end:
        return end.value


def trained_names(run: Run, client: str) -> set[str]:
    """The names that a client's turns ask to train, each turn done again from what it started from."""
    federation, found = run.federation, set[str]()
    algorithm = federation.algorithm
    frames = {index: order.frame for index, c, order in run.tape.orders if c == client}
    for index in range(1, PLAN.rounds + 1):
        learner = federation.population(client, index)
        local = private(run, index - 1, client) if index > 1 else algorithm.client_init(learner)
        down = unpack(algorithm.info.down, frames[index], federation.schema)
        (end,) = solve([(learner, noting(algorithm.train(learner, local, down), learner, found))])
        assert isinstance(end, Trained)
    return found


def names_in(value: object) -> Iterator[str]:
    """The keys of every mapping in a record."""
    if isinstance(value, Mapping):
        yield from value
    for inner in vars(value).values() if dataclasses.is_dataclass(value) else ():
        yield from names_in(inner)


@every_algorithm
def test_what_is_frozen_stays_as_drawn_at_every_client(name: str) -> None:
    """Of the trained model: the names that neither travel nor are kept are the seed's, to the bit."""
    algorithm, run = VARIANTS[name], reference(name)
    initial = run.federation.population.initial
    for client in CLIENTS:
        asked = trained_names(run, client)
        crossed = [
            unpack(algorithm.info.down, o.frame, run.federation.schema) for _, c, o in run.tape.orders if c == client
        ]
        given = {name for down in crossed for name in names_in(down)}
        weights = unpack(KeptModel, run.stores[-1][client][f"personal@{PLAN.rounds}"], run.federation.schema).weights
        for factor, tensor in initial.items():
            if image(weights[factor]) != image(tensor):
                assert factor in asked | given, factor
        assert any(image(weights[factor]) != image(initial[factor]) for factor in asked)


# --- clients that are not drawn -----------------------------------------------------------------------------------


@every_algorithm
def test_with_a_fraction_only_the_drawn_train_and_everybody_is_scored(name: str) -> None:
    run = record_run(again(name), plan=Plan(rounds=2, fraction=0.5))
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


# --- clients of unlike rank ---------------------------------------------------------------------------------------

RANKS = dict(zip(CLIENTS, (1, 3, 2, 4), strict=True))
mixed = pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].info.mixed_ranks])


def unlike(name: str, **options: Any) -> Population:
    return population_of(again(name), ranks=RANKS, **options)


def ranks_in(weights: Tensors) -> dict[str, int]:
    return {n: len(w) if part(n) == "A" else w.shape[1] for n, w in weights.items() if part(n) in ("A", "B")}


@mixed
def test_each_client_trains_predicts_and_sends_at_its_own_rank_or_below(name: str) -> None:
    run, algorithm = record_run(again(name), unlike(name)), VARIANTS[name]
    assert [rnd.heard for rnd in run.rounds] == [CLIENTS, CLIENTS, ()]
    assert not any(rnd.excluded for rnd in run.rounds)
    for _, client, reply in run.tape.replies:
        for model in ("received@1", "personal@2"):
            weights = unpacked(KeptModel, run.stores[-1][client][model], run.federation.schema).weights
            assert max(ranks_in(weights).values()) <= RANKS[client]
        if reply.frame:
            up = unpack(algorithm.info.up, reply.frame, run.federation.schema)
            sent = getattr(up, "weights", None) or {}
            assert max(ranks_in(sent).values(), default=0) <= RANKS[client]


@mixed
def test_unlike_ranks_survive_clients_that_are_away_fail_or_never_answer(name: str) -> None:
    """c3, the only one of the largest rank, is never heard, and c0, of the smallest, joins late."""
    population = unlike(name, faults={("c2", 2): RuntimeError("the disk is full")})
    gone = lost(("c0", 1), ("c0", 2), ("c1", 3), *(("c3", index) for index in range(1, 4)))
    run = record_run(again(name), population, Plan(rounds=4), gone)
    assert [rnd.heard for rnd in run.rounds] == [("c1", "c2"), ("c1",), ("c0", "c2"), CLIENTS, ()]
    losses = [score["received"]["loss"] for score in run.rounds[-1].scores.values()]
    assert len(losses) == len(CLIENTS)
    assert all(map(math.isfinite, losses))


@mixed
def test_with_unlike_ranks_sharing_passes_and_resuming_change_nothing(name: str) -> None:
    expected = record_run(again(name), unlike(name))
    federation = Federation(again(name), unlike(name), stores=expected.stores[0])
    rest = list(federation.run(PLAN, checkpoint=expected.rounds[0].checkpoint))
    assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in expected.rounds[1:]]
    for found, alone in zip(together(Federation(again(name), unlike(name)), PLAN), expected.rounds, strict=True):
        for client, moments in alone.scores.items():
            for moment, metrics in moments.items():
                assert found.scores[client][moment] == pytest.approx(metrics, abs=1e-5)


# --- training does something --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in VARIANTS if "more" not in n])
def test_the_toy_is_learnt(name: str) -> None:
    """Otherwise the suite would compare runs in which nothing happens."""
    rounds = reference(name).rounds
    first, last = (
        sum(s["received"]["loss"] for s in rnd.scores.values()) / len(CLIENTS) for rnd in (rounds[0], rounds[-1])
    )
    assert last < first - 0.05
