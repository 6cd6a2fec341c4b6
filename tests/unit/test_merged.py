"""W at the server and at its clients: increments, whole deliveries, and states that do not fit."""

import pytest
import torch
from torch import Tensor

from celora.core.merged import NOTHING, Delivery, Factors, Merged, MergeLog, added
from tests.toy import image

NAME = "layer.W"


def increment(seed: int) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    return {NAME: Factors(torch.randn(3, 2, generator=draw), torch.randn(2, 4, generator=draw))}


def ledger(*heard: tuple[str, ...]) -> MergeLog:
    """After as many rounds, in which these were heard."""
    found = MergeLog(NOTHING, {}, {})
    for seed, clients in enumerate(heard):
        found = found.after(increment(seed), clients)
    return found


def w(merged: Merged) -> Tensor:
    return merged.total[NAME]


def test_w_is_the_sum_of_the_increments() -> None:
    total = ledger(("a",), ("a",), ("a",)).merged
    assert total.version == 3
    torch.testing.assert_close(w(total), sum(increment(seed)[NAME].b @ increment(seed)[NAME].a for seed in range(3)))


def test_a_module_without_an_increment_stays_the_same_object() -> None:
    one, two = torch.ones(2, 2), torch.ones(2, 2)
    found = added({"one.W": one, "two.W": two}, {"two.W": Factors(torch.ones(2, 1), torch.ones(1, 2))})
    assert found["one.W"] is one
    assert torch.equal(found["two.W"], 2 * one)
    assert torch.equal(two, one)


def test_whoever_was_heard_last_is_sent_the_increment_and_others_w() -> None:
    server = ledger(("a", "b"), ("a",))
    one, more, new = (server.delivery(client) for client in ("a", "b", "new"))
    assert (list(one.last), one.total) == ([NAME], {})
    assert (more.last, list(more.total)) == ({}, [NAME])
    assert (new.last, list(new.total)) == ({}, [NAME])
    assert image(ledger().delivery("a")) == image(Delivery(0, {}, {}))
    assert list(ledger(("a",)).delivery("new").last) == [NAME]  # everybody had version 0


def test_both_sides_have_the_same_bits() -> None:
    server, client = MergeLog(NOTHING, {}, {}), NOTHING
    for seed in range(4):
        server = server.after(increment(seed), ("a",))
        client = client.after(server.delivery("a"))
        assert client.version == server.merged.version
        assert torch.equal(w(client), w(server.merged))
    assert torch.equal(w(NOTHING.after(server.delivery("new"))), w(server.merged))


def test_what_a_client_has_already_is_not_added_again() -> None:
    """It trained, its reply was lost, and the round is asked for again."""
    server = ledger(("a",), ("a",))
    once = Merged(1, ledger(("a",)).merged.total).after(server.delivery("a"))
    assert once.after(server.delivery("a")) is once
    assert once.after(server.delivery("new")) is once


def test_a_client_further_behind_than_the_server_thought_says_so_and_is_sent_w_next() -> None:
    server = ledger(("a",), ("a",))
    with pytest.raises(ValueError, match=r"found W of version 0 here, expected 1: .* sits out this round"):
        NOTHING.after(server.delivery("a"))
    later = server.after(increment(2), ("b",))
    assert torch.equal(w(NOTHING.after(later.delivery("a"))), w(later.merged))


def test_nothing_handed_in_is_changed() -> None:
    server = ledger(("a",))
    before, held = w(server.merged).clone(), dict(server.held)
    server.after(increment(1), ("b",))
    assert torch.equal(w(server.merged), before)
    assert server.held == held
