"""celora.core.channel: what a stage sees, what it may refuse, what it keeps, and that both ends agree.

The stages in here are the smallest that can show it: one promises protection, one has its say in what comes down.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from celora.algorithms import fedit
from celora.algorithms.ce_lora import CELoRA
from celora.algorithms.fedit import FedIT
from celora.algorithms.local import LocalOnly
from celora.core.channel import (
    NOTHING_KEPT,
    Channel,
    ChannelState,
    Encoded,
    Fields,
    Stage,
    Uplink,
    decode,
    encode,
    wire,
)
from celora.core.client_state import KeptModel, unpacked
from celora.core.messages import Exchange, Instruction, Plan, Reply, Round
from celora.errors import PolicyError, QuorumError
from celora.fields import setting, settings
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise
from celora.tensors import Tensors
from celora.wire import Schema, pack, record, unpack
from tests.toy import CLIENTS, Federation, Tape, lost

Q4 = (Quantise(bits=4),)


@settings
class Blur(Stage):
    """Round to whole steps: a stand-in for a stage that promises protection, as noise would."""

    protects: ClassVar[bool] = True

    step: float = setting(0.25, "to multiples of this")

    def describe(self) -> str:
        return f"blur to {self.step:g}"

    def covers(self, tensor: Tensor, start: Tensor | None) -> bool:
        return start is not None and tensor.is_floating_point()

    def encode(self, up: Uplink, state: Fields) -> Encoded:
        return Encoded(
            {
                field: {name: (tensor / self.step).round() * self.step for name, tensor in tensors.items()}
                for field, tensors in up.fields.items()
            }
        )


@settings
class Cautious(Stage):
    """Refuses a downlink with a number above `most`, and takes the sign of all others away."""

    most: float = setting(100.0, "the largest number")

    def describe(self) -> str:
        return f"nothing above {self.most:g}"

    def covers(self, tensor: Tensor, start: Tensor | None) -> bool:
        return False

    def encode(self, up: Uplink, state: Fields) -> Encoded:
        return Encoded(up.fields)

    def receive(self, down: Any) -> fedit.Down:
        if any(float(tensor.abs().max()) > self.most for tensor in down.weights.values()):
            raise PolicyError(f"the filter '{self.describe()}' found a larger number in what came down")
        return fedit.Down({name: tensor.abs() for name, tensor in down.weights.items()})


@settings
class Counting(Stage):
    """Keeps how often it was asked, and adds it to what is sent."""

    start: int = setting(0, "where it begins")

    def describe(self) -> str:
        return "count"

    def covers(self, tensor: Tensor, start: Tensor | None) -> bool:
        return tensor.is_floating_point()

    def encode(self, up: Uplink, state: Fields) -> Encoded:
        count = state.get("", {}).get("count", torch.tensor(self.start)) + 1
        fields = {f: {n: tensor + count for n, tensor in tensors.items()} for f, tensors in up.fields.items()}
        return Encoded(fields, {"": {"count": count}}, f"asked {int(count)} times")


@record
class Up:
    weights: Tensors
    summary: Mapping[str, Tensor]
    cipher: tuple[bytes, ...]
    examples: int


# --- a stage that promises protection


def test_a_stage_that_promises_protection_refuses_a_record_with_more_than_it_covers_and_names_it() -> None:
    down, weights = fedit.Down({"a": torch.zeros(2)}), {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(PolicyError) as refused:
        encode((Blur(),), Up({**weights, "b": torch.ones(2)}, {"m": torch.ones(1)}, (b"c",), 3), down, {})
    assert str(refused.value) == (
        "test_channel.Up is not sent: the filter 'blur to 0.25' promises protection and does not cover weights/n, "
        "weights/b, summary/m, cipher/0; expected a record whose tensors are all covered: choose another algorithm or "
        "other settings of it, or leave out the filter ([[filters]])"
    )
    covered = Up({"a": torch.tensor([0.3, 0.9])}, {}, (), 3)
    blurred: Any = encode((Blur(),), covered, down, {})[0]
    assert blurred.weights["a"].tolist() == [0.25, 1.0] and blurred.examples == 3


def test_a_stage_that_promises_nothing_lets_the_same_record_pass() -> None:
    up = Up({"a": torch.ones(2)}, {"m": torch.ones(1)}, (b"c",), 3)
    passed: Any = encode((Clip(norm=0.1), Quantise()), up, fedit.Down({"a": torch.zeros(2)}), {})[0]
    assert passed.summary is up.summary and passed.cipher is up.cipher


def test_in_a_run_its_clients_are_left_out_with_that_reason_and_nothing_of_them_crosses() -> None:
    """CE-LoRA's data summary has no counterpart; without it, and for FedIT, everything is covered."""
    channel = (Blur(),)
    federation = Federation(CELoRA(), channel=channel)
    tape = Tape(federation.engine)
    with pytest.raises(QuorumError, match=r"PolicyError: ce_lora\.Up is not sent: the filter 'blur to 0\.25' promises"):
        list(federation.run(Plan(rounds=1), lambda _: tape))
    assert all(reply.frame == b"" and "summary/means" in (reply.error or "") for _, _, reply in tape.replies)
    assert federation.stores == {}
    for algorithm in (CELoRA(data_share=0.0), FedIT(), LocalOnly()):
        [done, _] = Federation(algorithm, channel=channel).run(Plan(rounds=1))
        assert done.heard == CLIENTS


# --- what comes down


def test_a_stage_may_transform_what_comes_down_and_changes_are_still_of_what_was_sent() -> None:
    [first, second, _] = Federation(FedIT(), channel=(Cautious(), Quantise(bits=8))).run(Plan(rounds=2))
    [same, other, _] = Federation(FedIT(), channel=(Quantise(bits=8),)).run(Plan(rounds=2))
    assert first.scores == same.scores and first.heard == second.heard == CLIENTS
    assert second.scores["c0"]["received"] != other.scores["c0"]["received"]
    down, up = fedit.Down({"a": -torch.ones(2)}), fedit.Up({"a": torch.tensor([-0.9, -1.1])}, 3)
    read: Any = decode(Q4, encode((Cautious(), *Q4), up, down, {})[0], down, {})
    torch.testing.assert_close(read.weights["a"], up.weights["a"], atol=0.1 / 14 + 1e-6, rtol=0)


def test_a_stage_may_refuse_what_comes_down() -> None:
    federation = Federation(FedIT(), channel=(Cautious(most=1e-6),))
    rounds = federation.run(Plan(rounds=2))
    assert next(rounds).heard == CLIENTS  # before the first average nothing comes down
    with pytest.raises(QuorumError, match=r"PolicyError: the filter 'nothing above 1e-06' found a larger number"):
        next(rounds)


# --- bytes


@pytest.mark.parametrize(
    ("channel", "payload", "head"),
    [
        ((), 4 * (24 + 32), 4 * (16 + 2)),
        ((Clip(norm=0.1),), 4 * (24 + 32), 4 * (16 + 2)),
        ((Quantise(bits=8),), 24 + 32 + 2 * 4, 16 + 2 + 2 * 4),
        ((Quantise(bits=4),), 12 + 16 + 2 * 4, 8 + 1 + 2 * 4),
        ((Clip(norm=0.1), Quantise(bits=4)), 12 + 16 + 2 * 4, 8 + 1 + 2 * 4),
    ],
    ids=str,
)
def test_the_bytes_of_a_round_are_those_of_what_was_packed(channel: Channel, payload: int, head: int) -> None:
    """A (4, 6), B (8, 4), head.weight (2, 8), head.bias (2,), float32 or codes and a scale each."""
    federation, tapes = Federation(FedIT(), channel=channel), list[Tape]()

    def taped(exchange: Exchange) -> Tape:
        tapes.append(Tape(exchange))
        return tapes[0]

    first = next(federation.run(Plan(rounds=2), taped))
    sizes = {client: len(reply.frame) for _, client, reply in tapes[0].replies}
    for client, traffic in first.traffic.items():
        assert (traffic.up_payload, traffic.head_up, traffic.summary) == (payload, head, 0)
        assert traffic.up_frame == sizes[client] > payload + head
    plain = next(Federation(FedIT()).run(Plan(rounds=2)))
    assert {c: t.down_frame for c, t in first.traffic.items()} == {c: t.down_frame for c, t in plain.traffic.items()}


def test_a_frame_that_cannot_be_decoded_costs_its_sender_the_round_and_nobody_else() -> None:
    def tampered(exchange: Exchange) -> Exchange:
        def exchange_tampered(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = dict(exchange(orders))
            schema = wire(Q4, Schema.of(federation.population.initial))
            if orders["c1"].action == "train":
                up = unpack(fedit.Up, replies["c1"].frame, schema)
                broken = {name: tensor for name, tensor in up.weights.items() if name != "layer.A:scale"}
                replies["c1"] = Reply(pack(fedit.Up(broken, 3), schema), replies["c1"].scores, None)
            return replies

        return exchange_tampered

    federation = Federation(FedIT(), channel=Q4)
    first = next(federation.run(Plan(rounds=1), tampered))
    assert first.heard == ("c0", "c2", "c3")
    assert first.excluded == {"c1": "layer.A:int4: found no scale for it, expected layer.A:scale, a float32 number"}
    assert (first.traffic["c1"].up_payload, first.traffic["c1"].head_up) == (12 + 16 + 4, 8 + 1 + 2 * 4)  # as it came


# --- what stages keep, and when


@dataclass
class Ledgered:
    """FedIT under 4 bits, round by round: what c1's model became, what the server could read of it, what was left."""

    rounds: list[Round]
    true: dict[int, Tensor]
    read: dict[int, Tensor]
    left: dict[int, Tensor]


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def ledgered(rounds: int, without: tuple[int, ...] = ()) -> Ledgered:
    """The run of c1, whose reply is lost in the rounds `without` after it has trained."""
    federation, tapes = Federation(FedIT(), channel=Q4), list[Tape]()

    def around(exchange: Exchange) -> Exchange:
        tapes.append(Tape(exchange))

        def losing(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = tapes[0](orders)
            return {c: reply for c, reply in replies.items() if c != "c1" or orders[c].round not in without}

        return losing

    found = Ledgered([], {}, {}, {0: torch.zeros(24 + 32 + 16 + 2).double()})
    schema, initial = federation.schema, federation.population.initial
    for done in federation.run(Plan(rounds=rounds), around):
        found.rounds.append(done)
        if done.index > rounds:
            break
        [order] = [order for index, client, order in tapes[0].orders if (index, client) == (done.index, "c1")]
        [reply] = [reply for index, client, reply in tapes[0].replies if (index, client) == (done.index, "c1")]
        down = unpack(fedit.Down, order.frame, schema)
        start = flat({**initial, **down.weights})
        store = federation.stores["c1"]
        model = unpacked(KeptModel, store[f"personal@{done.index}"], schema).weights
        up: Any = decode(Q4, unpack(fedit.Up, reply.frame, wire(Q4, schema)), down, initial)
        kept = unpacked(ChannelState, store[f"channel@{done.index}"], schema)
        [fields] = kept.stages.values()
        found.true[done.index], found.read[done.index] = flat(model) - start, flat(up.weights) - start
        found.left[done.index] = flat(fields["weights"])
    return found


def test_over_a_run_the_server_reads_the_sum_of_the_true_changes_up_to_the_last_residual() -> None:
    found = ledgered(6)
    assert all(done.heard == CLIENTS for done in found.rounds[:-1])
    true, read = sum(found.true.values()), sum(found.read.values())
    torch.testing.assert_close(read + found.left[6], true, atol=1e-5, rtol=0)
    alone = sum((found.true[index] - found.read[index]).norm() for index in found.true)
    assert found.left[6].norm() < alone / 2 and found.left[6].norm() > 0


def test_a_lost_reply_takes_its_residual_with_it_and_no_residual_is_counted_twice() -> None:
    """Rounds 1, 2 and 4, 5 are heard: of each stretch the sum is right up to the residuals at its two ends."""
    found = ledgered(5, without=(3,))
    assert [("c1" in done.heard) for done in found.rounds] == [True, True, False, True, True, False]
    for before, heard in ((0, (1, 2)), (3, (4, 5))):
        true, read = (sum(changes[index] for index in heard) for changes in (found.true, found.read))
        torch.testing.assert_close(read, true + found.left[before] - found.left[heard[-1]], atol=1e-5, rtol=0)


def test_a_client_keeps_what_stages_keep_beside_its_private_state_of_two_rounds() -> None:
    federation = Federation(FedIT(), channel=(Clip(norm=1.0), *Q4))
    names = [
        sorted(name for name in federation.stores["c1"] if name.startswith(("private", "channel")))
        for _ in federation.run(Plan(rounds=3))
    ]
    assert names[0] == ["channel@1", "private@1"]
    assert names[2] == names[3] == ["channel@2", "channel@3", "private@2", "private@3"]


def test_without_a_stage_that_has_something_to_keep_nothing_is_kept() -> None:
    for algorithm, channel in ((FedIT(), ()), (LocalOnly(), (Clip(norm=1.0), *Q4))):
        federation = Federation(algorithm, channel=channel)
        list(federation.run(Plan(rounds=2)))
        assert not [name for store in federation.stores.values() for name in store if name.startswith("channel")]


def test_a_client_that_was_not_drawn_leaves_its_residual_as_it_is() -> None:
    federation = Federation(FedIT(), channel=Q4)
    names: list[set[str]] = []
    for done in federation.run(Plan(rounds=4, fraction=0.5, seed=3)):
        names.append({name for name in federation.stores["c1"] if name.startswith("channel@")})
        trained = "c1" in done.heard
        assert (f"channel@{done.index}" in names[-1]) == trained
        if len(names) > 1 and not trained:
            assert names[-1] == names[-2]
    assert {len(kept) for kept in names} >= {1, 2}


def test_a_client_that_has_lost_its_state_starts_with_a_residual_of_zero() -> None:
    federation, tapes = Federation(FedIT(), channel=Q4), list[Tape]()

    def taped(exchange: Exchange) -> Tape:
        tapes.append(Tape(exchange))
        return tapes[0]

    rounds = federation.run(Plan(rounds=2), taped)
    next(rounds)
    federation.stores["c1"].clear()
    next(rounds)
    [order] = [order for index, client, order in tapes[0].orders if (index, client) == (2, "c1")]
    [reply] = [reply for index, client, reply in tapes[0].replies if (index, client) == (2, "c1")]
    down = unpack(fedit.Down, order.frame, federation.schema)
    model = unpacked(KeptModel, federation.stores["c1"]["personal@2"], federation.schema).weights
    expected, _ = encode(Q4, fedit.Up(model, 30), down, federation.population.initial, NOTHING_KEPT)
    assert reply.frame == pack(expected, wire(Q4, federation.schema))


def states(channels: tuple[Channel, ...]) -> Iterator[ChannelState]:
    """What is kept after a turn under each of these channels, one after another."""
    state = NOTHING_KEPT
    for channel in channels:
        _, state = encode(channel, fedit.Up({"a": torch.ones(2)}, 3), fedit.Down({"a": torch.zeros(2)}), {}, state)
        yield state


def test_each_stage_gets_back_what_it_kept_itself_whatever_stands_beside_it() -> None:
    once = (Counting(), Counting(start=10))
    twice = (Counting(), Blur(), Counting(), Counting(start=10))
    first, second, third = states((once, (Clip(norm=1.0), *once), once))
    assert [first.notes, second.notes[-2:], third.notes] == [
        ("asked 1 times", "asked 11 times"), ("asked 2 times", "asked 12 times"), ("asked 3 times", "asked 13 times")
    ]  # fmt: skip
    assert all(len(state.stages) == 2 for state in (first, second, third))
    for before, after in pairwise(states((twice[2:], (Counting(), Counting(), Counting(start=10))))):
        assert before.notes == ("asked 1 times", "asked 11 times")
        assert after.notes == ("asked 2 times", "asked 1 times", "asked 12 times")


def test_a_round_that_fails_at_a_stage_leaves_the_store_as_it_was() -> None:
    federation = Federation(FedIT(), channel=(Clip(norm=1.0), *Q4))
    rounds = federation.run(Plan(rounds=3), lost(("c0", 2)))
    next(rounds)
    before = federation.copies()["c1"]
    federation.engine.channel = (Blur(step=1e-3), Cautious(most=0.0))
    with pytest.raises(QuorumError, match="no reply; c1: PolicyError"):
        next(rounds)
    assert federation.copies()["c1"] == before
