"""celora.core.aggregation: means of a round's replies, one in memory at a time, and each where that is declared."""

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from celora.algorithms.fedex_lora import FedExLoRA
from celora.algorithms.fedit import FedIT, Server, Up
from celora.core.aggregation import Heard
from celora.core.messages import Exchange, Instruction, Plan, Reply
from celora.errors import QuorumError
from celora.tensors import Tensors, mean
from celora.wire import unpack
from tests.toy import CLIENTS, Federation, Tape, image, lost


def ups() -> dict[str, Up]:
    draw = torch.Generator().manual_seed(0)
    return {f"c{i}": Up({"layer.A": torch.randn(4, 6, generator=draw)}, 7 + i) for i in range(5)}


def weights(up: Up) -> Tensors:
    return up.weights


def rows(up: Up) -> float:
    return up.examples


def test_a_mean_is_that_of_tensors_to_the_bit_of_what_is_asked_for() -> None:
    expected = mean((up.weights, up.examples) for up in ups().values())
    assert image(Heard(ups()).mean(weights, rows)) == image(expected)
    halved = mean(({"half": up.weights["layer.A"] / 2}, 1.0) for up in ups().values())
    assert image(Heard(ups()).mean(lambda up: {"half": up.weights["layer.A"] / 2}, lambda up: 1.0)) == image(halved)


def test_a_sum_counts_every_holder_once() -> None:
    parts = {
        "a": Up({"x": torch.tensor([1.0, 2.0])}, 1),
        "b": Up({"x": torch.tensor([3.0, 0.5]), "y": torch.ones(1)}, 9),
    }
    assert image(Heard(parts).sum(weights)) == image({"x": torch.tensor([4.0, 2.5]), "y": torch.ones(1)})
    assert image(Heard(parts, stage=lambda total: {"x": total["y"]}).sum(weights)) == image({"x": torch.ones(1)})


def test_a_mean_passes_the_stage_and_each_reply_does_not() -> None:
    def doubled(average: Tensors) -> Tensors:
        return {name: 2 * w for name, w in average.items()}

    plain, staged = Heard(ups()), Heard(ups(), stage=doubled)
    assert torch.equal(staged.mean(weights, rows)["layer.A"], 2 * plain.mean(weights, rows)["layer.A"])
    assert image(dict(staged.each())) == image(ups())


def test_who_declares_means_cannot_read_a_reply() -> None:
    heard = Heard(ups(), "mean")
    with pytest.raises(RuntimeError, match=r'found `each\(\)` .* aggregation = "mean"'):
        heard.each()
    assert heard.clients == tuple(ups())


# --- in a run ---------------------------------------------------------------------------------------------------------


def running(aggregate: Any, aggregation: Any = "each", **options: Any) -> Any:
    """FedIT with another `aggregate`, on the toy federation."""

    class Reading(FedIT):
        info = dataclasses.replace(FedIT.info, aggregation=aggregation)

        def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
            aggregate(heard)
            return Server(heard.mean(weights, rows))

    return next(Federation(Reading()).run(Plan(rounds=1), **options))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many uplink records were in memory whenever another one was unpacked."""
    living, found = weakref.WeakSet[Up](), list[int]()

    def unpacking(kind: Any, *frame: Any) -> Any:
        if kind is Up:
            found.append(len(living))
        value = unpack(kind, *frame)
        if kind is Up:
            living.add(value)
        return value

    monkeypatch.setattr("celora.core.intake.unpack", unpacking)
    return found


def test_each_reply_is_unpacked_once_and_let_go_before_the_next(alive: list[int]) -> None:
    next(Federation(FedIT()).run(Plan(rounds=1)))
    assert alive == [0] * len(CLIENTS)


def test_a_second_pass_unpacks_again(alive: list[int]) -> None:
    running(lambda heard: dict(heard.each()))
    assert alive == [0, 1, 2, 3, *[0] * len(CLIENTS)]  # and the mean that follows unpacks them again, one at a time


def test_replies_that_fail_the_screen_are_not_there_whatever_is_asked_first() -> None:
    seen: list[Any] = []

    def both(heard: Heard[Up]) -> None:
        seen.append((heard.clients, [client for client, _ in heard.each()]))

    def reversed_(heard: Heard[Up]) -> None:
        seen.append(([client for client, _ in heard.each()], heard.clients))

    for aggregate in (both, reversed_):
        found = running(aggregate, around=spoiled)
        assert (found.heard, list(found.excluded)) == (("c0", "c2", "c3"), ["c1"])
        assert [list(clients) for clients in seen.pop()] == [["c0", "c2", "c3"]] * 2


def spoiled(exchange: Exchange) -> Exchange:
    """The frame of c1 is torn."""

    def torn(orders: Mapping[str, Instruction]) -> Mapping[str, Reply]:
        replies = exchange(orders)
        return {c: dataclasses.replace(r, frame=r.frame[:99] if c == "c1" else r.frame) for c, r in replies.items()}

    return torn


def test_passes_that_are_nested_or_left_halfway_each_see_every_reply() -> None:
    seen: list[tuple[str, ...]] = []

    def pairs(heard: Heard[Up]) -> None:
        next(iter(heard.each()))
        seen.extend((one, other) for one, _ in heard.each() for other, _ in heard.each())

    expected = image(next(Federation(FedIT()).run(Plan(rounds=1))).server)
    assert image(running(pairs).server) == expected
    assert seen == [(one, other) for one in CLIENTS for other in CLIENTS]


def test_below_the_quorum_nothing_is_made_of_the_replies_that_came() -> None:
    ended: list[str] = []

    def aggregate(heard: Heard[Up]) -> None:
        for client, _ in heard.each():
            ended.append(client)
        ended.append("end")

    with pytest.raises(QuorumError, match=r"round 1: 3 usable replies, the quorum is 4 \(c1: no reply\)"):
        next(below(aggregate))
    assert ended == ["c0", "c2", "c3"]


def test_an_aggregate_that_reads_nothing_does_not_hide_who_is_missing() -> None:
    with pytest.raises(QuorumError, match="3 usable replies"):
        next(below(lambda heard: None, reads=False))


def below(aggregate: Any, *, reads: bool = True) -> Iterator[Any]:
    class Reading(FedIT):
        info = dataclasses.replace(FedIT.info, aggregation="each")

        def aggregate(self, server: Server, heard: Heard[Up]) -> Server:
            aggregate(heard)
            return Server(heard.mean(weights, rows)) if reads else server

    return Federation(Reading()).run(Plan(rounds=1, quorum=4), lost(("c1", 1)))


def test_an_algorithm_that_declares_means_and_reads_replies_is_told_so() -> None:
    with pytest.raises(RuntimeError, match=r"found `each\(\)`"):
        running(lambda heard: dict(heard.each()), "mean")


def test_a_stage_for_an_algorithm_that_reads_replies_is_refused_before_anybody_is_asked() -> None:
    tapes: list[Tape] = []

    def taped(exchange: Exchange) -> Exchange:
        tapes.append(Tape(exchange))
        return tapes[0]

    run = Federation(FedExLoRA()).run(Plan(rounds=1), taped, mean_stage=dict)
    with pytest.raises(ValueError, match="a stage for the means of FedExLoRA, whose server reads each reply"):
        next(run)
    assert tapes[0].orders == []
