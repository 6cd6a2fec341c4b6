"""What every algorithm promises (tests/contract/test_algorithms.py), with filters between clients and server.

Every algorithm is run under every channel, and under one with both stages it is asked for all of its promises. `SOME`
algorithms, which take other paths through the channel, are asked for all of them under every channel.
"""

from collections.abc import Mapping
from functools import cache

import pytest
import torch

from celora.algorithms import ALGORITHMS
from celora.core.channel import Channel, ChannelState, named, wire
from celora.core.messages import Checkpoint, Exchange, Instruction, Plan, Reply
from celora.errors import QuorumError
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise
from celora.testing.federation import PLAN, Run, bits, record_run
from celora.testing.reproducibility import together
from celora.testing.travel import private_bytes_that_travel, received, sent
from celora.testing.variant import FULL
from celora.wire import pack, unpack
from tests.contract.test_algorithms import VARIANTS
from tests.toy import CLIENTS, Federation, image, lost, population_of, tensors_in

CHANNELS: Mapping[str, Channel] = {
    "clip": (Clip(norm=0.05),),
    "8 bits": (Quantise(bits=8),),
    "4 bits": (Quantise(bits=4),),
    "clip, 8 bits": (Clip(norm=0.05), Quantise(bits=8)),
}
VARIANT = {name: VARIANTS[f"{name}-{kind().head}"] for name, kind in ALGORITHMS.items()}
"""Algorithm -> its default settings in the other suite."""

BOTH = "clip, 8 bits"
SOME = {"fedit": "plain", "ce-lora": "a data summary", "hetlora": "ranks that shrink", "ravan": "others each round"}
matrix = pytest.mark.parametrize(("name", "channel"), [(name, channel) for name in ALGORITHMS for channel in CHANNELS])
sample = pytest.mark.parametrize(
    ("name", "channel"),
    [(name, channel) for name in ALGORITHMS for channel in CHANNELS if channel == BOTH or name in SOME],
)


def federation(name: str, channel: str, **more: object) -> Federation:
    return Federation(ALGORITHMS[name](), channel=CHANNELS[channel], **more)  # type: ignore[arg-type]


@cache
def filtered(name: str, channel: str) -> Run:
    return record_run(ALGORITHMS[name](), channel=CHANNELS[channel])


@matrix
def test_a_run_does_not_depend_on_the_order_of_clients_and_replies(name: str, channel: str) -> None:
    def shuffled(exchange: Exchange) -> Exchange:
        def exchange_shuffled(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
            replies = exchange(orders)
            return {client: replies[client] for client in ("c1", "c3", "c0", "c2")}

        return exchange_shuffled

    expected, again = filtered(name, channel), federation(name, channel, clients=CLIENTS[::-1])
    assert [rnd.heard for rnd in expected.rounds] == [CLIENTS, CLIENTS, ()]
    assert [bits(rnd) for rnd in again.run(PLAN, shuffled)] == [bits(rnd) for rnd in expected.rounds]
    assert again.copies() == expected.stores[-1]


@sample
def test_a_run_resumed_from_bytes_is_bit_equal_to_one_that_was_never_stopped(name: str, channel: str) -> None:
    expected = filtered(name, channel)
    for done in range(1, PLAN.rounds + 1):
        checkpoint = unpack(Checkpoint, pack(expected.rounds[done - 1].checkpoint))
        resumed = federation(name, channel, stores=expected.stores[done - 1])
        rest = list(resumed.run(PLAN, checkpoint=checkpoint))
        assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in expected.rounds[done:]]
        assert resumed.copies() == expected.stores[-1]


@sample
def test_a_round_that_is_repeated_after_a_missed_quorum_is_the_round_that_was_missed(name: str, channel: str) -> None:
    """From the stores that the failed round has left: nobody trains twice, no residual is counted twice."""
    failing = federation(name, channel)
    rounds = failing.run(FULL, lost(("c1", 2)))
    first = next(rounds)
    with pytest.raises(QuorumError):
        next(rounds)
    rest = federation(name, channel, stores=failing.stores).run(FULL, checkpoint=first.checkpoint)
    assert [bits(rnd) for rnd in rest] == [bits(rnd) for rnd in filtered(name, channel).rounds[1:]]


@sample
def test_clients_that_are_away_or_fail_are_left_out_and_heard_again(name: str, channel: str) -> None:
    algorithm = ALGORITHMS[name]()
    population = population_of(algorithm, faults={("c2", 2): RuntimeError("the disk is full")})
    away = lost(("c1", 2), *(("c3", index) for index in range(1, 5)))
    run = record_run(algorithm, population, Plan(rounds=3), away, channel=CHANNELS[channel])
    assert [rnd.heard for rnd in run.rounds] == [("c0", "c1", "c2"), ("c0",), ("c0", "c1", "c2"), ()]
    assert run.rounds[1].excluded["c2"] == "RuntimeError: the disk is full"
    for client in ("c1", "c2"):
        assert image(run.private(1, client)) == image(run.private(2, client))
        kept = [{key: value for key, value in run.stores[at][client].items() if "channel" in key} for at in (0, 1)]
        assert kept[0] == kept[1]


@sample
def test_nothing_private_and_no_residual_is_in_anything_that_crosses(name: str, channel: str) -> None:
    run, variant = filtered(name, channel), VARIANT[name]
    assert private_bytes_that_travel(run, received(variant), sent(variant)) == []
    frames = [pack(message) for _, _, message in (*run.tape.orders, *run.tape.replies)]
    crossed = {frame[at : at + 32] for frame in frames for at in range(len(frame) - 31)}
    kept = [frame for store in run.stores[-1].values() for key, frame in store.items() if key.startswith("channel@")]
    for tensor in tensors_in([unpack(ChannelState, frame, run.federation.schema) for frame in kept]):
        raw = image(tensor)[3]
        windows = {raw[at : at + 32] for at in range(len(raw) - 31)}
        assert not {window for window in windows if window != window[:4] * 8} & crossed
    assert bool(kept) == variant.sends_anything


def coarsest(run: Run, channel: str) -> float:
    """The largest scale that was sent; 0 where nothing is quantised."""
    info, schema = run.federation.algorithm.info, wire(CHANNELS[channel], run.federation.schema)
    ups = [unpack(info.up, reply.frame, schema) for _, _, reply in run.tape.replies if reply.frame]
    crossed = [item for up in ups for _, tensors in named(up) for item in tensors.items()]
    return max((float(tensor) for name, tensor in crossed if name.endswith(":scale")), default=0.0)


@sample
def test_clients_that_share_passes_send_what_they_send_alone(name: str, channel: str) -> None:
    """To a step or two of the coarsest scale: rounding may fall to the other side of a half."""
    found, expected = together(federation(name, channel), PLAN), filtered(name, channel)
    for mine, its in zip(found, expected.rounds, strict=True):
        assert (mine.heard, mine.excluded, mine.traffic) == (its.heard, its.excluded, its.traffic)
        atol = 1e-5 + 2 * coarsest(expected, channel)
        for one, other in zip(tensors_in(mine.server), tensors_in(its.server), strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_quantised_frames_are_smaller_and_of_the_same_size_whatever_is_clipped(name: str) -> None:
    variant = VARIANT[name]
    plain = [sum(t.up_frame for t in rnd.traffic.values()) for rnd in variant.reference.rounds]
    sizes = {
        channel: [sum(t.up_frame for t in rnd.traffic.values()) for rnd in filtered(name, channel).rounds]
        for channel in CHANNELS
    }
    assert sizes["clip"] == plain and sizes["clip, 8 bits"] == sizes["8 bits"]
    if variant.sends_anything:
        assert sizes["4 bits"][1] < sizes["8 bits"][1] < plain[1]
