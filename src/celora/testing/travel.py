"""The contract, part 4: what travels, and that nothing else does."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from celora.core.client_state import unpacked
from celora.errors import WireError
from celora.marks import Received, Sent, marked
from celora.tensors import Tensors
from celora.testing.federation import PLAN, Run, image, newest, tensors_in
from celora.testing.population import CLIENTS
from celora.testing.variant import Variant
from celora.wire import NOTHING, pack, unpack
from celora.wire.records import form_of


def private_bytes_that_travel(run: Run, received: tuple[str, ...] = (), sent: tuple[str, ...] = ()) -> list[str]:
    """Where 32 consecutive bytes of a tensor of any client's `Local` cross, at whatever offset, in whatever round.

    All that crosses is searched: orders and replies whole, so frames, scores and errors alike. A tensor of fewer than
    32 bytes is searched for whole. Windows that repeat one number (the zeros of a B that has not moved) are left out:
    they are the seed's, and tell nothing of a client. The fields in `received` came down: they are searched for in
    what goes up. Those in `sent` went up: they are searched for in what comes down.
    """
    up = [pack(reply) for _, _, reply in run.tape.replies]
    down = [pack(order) for _, _, order in run.tape.orders]
    assert sum(map(len, down + up)) > sum(len(reply.frame) for _, _, reply in run.tape.replies) > 0
    fields = {field.name for field in dataclasses.fields(run.federation.algorithm.info.local)}
    found: list[str] = []
    for searched, crossed in (
        (fields - {*received, *sent}, down + up),
        (fields.intersection(received), up),
        (fields.intersection(sent), down),
    ):
        wanted: dict[bytes, str] = {}
        for index, stores in enumerate(run.stores, 1):
            for client, store in stores.items():
                local = vars(run.federation.private(store))
                for tensor in (tensor for name in sorted(searched) for tensor in tensors_in(local[name])):
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


def received(variant: Variant) -> tuple[str, ...]:
    """The fields of a variant's `Local` that the server has sent to everybody."""
    return tuple(marked(variant.algorithm.info.local, Received))


def sent(variant: Variant) -> tuple[str, ...]:
    """The fields of a variant's `Local` that the client has sent."""
    return tuple(marked(variant.algorithm.info.local, Sent))


def named_tensors(up: Any) -> Iterator[Tensors | None]:
    """The named tensors of a record; None for those that are left out."""
    form = form_of(up.__class__)
    for name, inner in zip(form.names, form.inner, strict=True):
        kinds = (inner.kind, *(of.kind for of in inner.inner))
        if kinds in (("tensors",), ("maybe", "tensors")):
            yield vars(up)[name]


class Travel:
    """What crosses, what must not, and the frames it crosses in."""

    def test_no_32_bytes_of_a_private_tensor_are_in_anything_that_crosses(self, variant: Variant) -> None:
        assert private_bytes_that_travel(variant.reference, received(variant), sent(variant)) == []

    def test_what_is_marked_as_sent_is_sent(self, variant: Variant) -> None:
        """Otherwise the mark would hide what need not be hidden."""
        assert not sent(variant) or private_bytes_that_travel(variant.reference, received(variant))

    def test_what_is_marked_as_received_is_the_same_at_every_client(self, variant: Variant) -> None:
        for index in range(1, PLAN.rounds + 1):
            for field in received(variant):
                kept = [vars(variant.reference.private(index, client))[field] for client in CLIENTS]
                assert all(image(other) == image(kept[0]) for other in kept)

    def test_a_reply_holds_exactly_the_names_that_the_algorithm_says_it_shares(self, variant: Variant) -> None:
        algorithm, run = variant.algorithm, variant.reference
        schema = run.federation.schema
        shared = {name for name in schema.entries if algorithm.shares(name)}
        ups: list[Any] = [unpack(algorithm.info.up, r.frame, schema) for _, _, r in run.tape.replies if r.frame]
        assert len(ups) == PLAN.rounds * len(CLIENTS)
        for up in ups:
            fields = list(named_tensors(up))
            names = [set(tensors) for tensors in fields if tensors is not None]
            if algorithm.info.partial:
                assert all(some and some <= shared for some in names)
            else:  # None: nothing yet, told apart from a reply that lacks something
                assert names == ([shared] if shared and None not in fields else [])

    def test_a_model_holds_known_names_in_their_shapes_and_no_others(self, variant: Variant) -> None:
        algorithm, run = variant.algorithm, variant.reference
        schema = run.federation.schema
        downs = {(index, client): order.frame for index, client, order in run.tape.orders}
        for index in range(2, PLAN.rounds + 2):
            for client in CLIENTS:
                down: Any = unpack(algorithm.info.down, downs[index, client], schema)
                model = algorithm.model(run.private(index - 1, client), down)
                assert schema.names(model) if algorithm.info.mixed_ranks else schema.covers(model)

    def test_the_four_records_come_back_from_the_wire_as_they_went(self, variant: Variant) -> None:
        algorithm, run = variant.algorithm, variant.reference
        schema, info = run.federation.schema, algorithm.info
        frames: dict[Any, list[bytes]] = {
            info.server: [rnd.checkpoint.server for rnd in run.rounds],
            info.local: [store[newest(store)] for stores in run.stores for store in stores.values()],
            info.down: [order.frame for _, _, order in run.tape.orders],
            info.up: [reply.frame for _, _, reply in run.tape.replies if reply.frame],
        }
        for kind, packed in frames.items():
            for frame in packed:
                value = unpack(kind, frame, schema)
                assert pack(value, schema) == frame
                assert image(unpack(kind, pack(value), NOTHING)) == image(value)
                for other in frames.keys() - {kind}:
                    with pytest.raises(WireError, match=r"found a frame of kind \w+\.\w+, expected"):
                        unpack(other, frame, schema)
        for rnd in run.rounds:
            assert image(unpacked(info.server, rnd.checkpoint.server, schema)) == image(rnd.server)
