"""The channel: the stages between a trained update and the wire, the same for every engine.

    client   trained.up ──► stage 1 ──► … ──► stage n ──► frame        encode, in `celora.core.client.answer`
    server   frame ──► stage n ──► … ──► stage 1 ──► screen            decode, in `celora.core.rounds`

A stage sees the tensors of an uplink record that it covers, each beside its counterpart: the tensor that both ends know
and that the change is measured against. It may replace them, keep a state of its own at the client, leave a note there,
and change what travels in their place. A stage that changes the wire type (`packs`) says with `wire` which tensors
travel instead; the fingerprint of every frame covers them, so both ends must have the same stages of that kind.

The counterpart of a tensor has its name and its shape. It is the tensor in the downlink's field of the same name, else
in another of the downlink's fields of named tensors, else the leading block of the weights that everybody starts from.

What a stage keeps belongs to the round like the client's private state and lies beside it: a round that is asked for
twice starts from the state before it and gives the same reply, a client without a state starts with none. If a reply is
lost and the rounds go on, the client goes on from the state after the lost round, as it does with its private state:
what that reply carried is lost, and nothing is counted twice.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from celora.errors import PolicyError, WireError
from celora.lazy import Tensor
from celora.tensors import Tensors
from celora.wire import Schema, leaves, name_of, record

Fields = Mapping[str, Tensors]
"""Field of a record -> its named tensors."""
Start = Callable[[str, tuple[int, ...]], Tensor | None]
"""Name and shape -> the counterpart in one field, or None."""


@dataclass(frozen=True)
class Uplink:
    """An uplink record as a stage sees it.

    Attributes:
        kind: the record's name.
        fields: the tensors that the stage covers.
        start: their counterparts; a tensor that has none is missing.
        others: whatever else is in the record, tensors and byte strings, by path such as "summary/means".
    """

    kind: str
    fields: Fields
    start: Fields
    others: Mapping[str, Tensor | bytes]


@dataclass(frozen=True)
class Encoded:
    """What a stage made of an uplink record.

    Attributes:
        fields: what takes the place of the tensors it covers.
        state: what it keeps at the client until the next round.
        note: one line for the client alone.
    """

    fields: Fields
    state: Fields = dataclasses.field(default_factory=dict)
    note: str | None = None


class Stage:
    """A stage of the channel: a frozen dataclass of settings whose methods are pure.

    Attributes:
        protects: whether it promises to protect whatever is sent. Such a stage refuses a record with tensors or byte
            strings that it does not cover.
        packs: whether it changes the wire type. Such a stage is the last one, and both ends must have it.
    """

    protects: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    def describe(self) -> str:
        """What it does, in a few words that follow "filters:"."""
        raise NotImplementedError

    def covers(self, tensor: Tensor, start: Tensor | None) -> bool:
        """Whether it acts on this tensor, whose counterpart is `start`."""
        raise NotImplementedError

    def encode(self, up: Uplink, state: Fields) -> Encoded:
        """What is sent in place of the covered tensors.

        Args:
            state: what the stage kept after the client's last round; empty at first.

        Raises:
            PolicyError: if nothing may be sent.
        """
        raise NotImplementedError

    def decode(self, tensors: Tensors, start: Start) -> Tensors:
        """The tensors of one field as they were before `encode`; asked only of a stage that packs.

        Raises:
            WireError: if they do not fit together.
        """
        return tensors

    def wire(self, schema: Schema) -> Schema:
        """The tensors that may travel after this stage, where `schema` holds those that may come to it."""
        return schema

    def receive(self, down: object) -> object:
        """The downlink record that the client works with. Counterparts are those of the record that was sent.

        Raises:
            PolicyError: if the client may not work with it.
        """
        return down

    def meets(self, required: "Stage") -> bool:
        """Whether it does at least what `required` would do."""
        return self == required


Channel = tuple[Stage, ...]


@record
class ChannelState:
    """What the stages leave at a client in a round, never sent.

    Attributes:
        stages: stage -> field -> what it keeps.
        notes: what they tell of this round.
    """

    stages: Mapping[str, Mapping[str, Tensors]]
    notes: tuple[str, ...]


NOTHING_KEPT = ChannelState({}, ())


def encode(
    channel: Channel, up: object, down: object, initial: Tensors, state: ChannelState = NOTHING_KEPT
) -> tuple[object, ChannelState]:
    """What a client sends in place of `up`, and what its stages leave there.

    Args:
        down: the downlink record of this round, as it was sent.
        initial: every weight at round 0.
        state: what they left in the round that this one starts from.

    Raises:
        PolicyError: if a stage refuses: nothing may be sent.
    """
    kept, notes = dict[str, Fields](), list[str]()
    for position, stage in enumerate(channel):
        key = f"{stage!r}/{channel[:position].count(stage)}"  # the same whatever a site's policy puts beside it
        seen = _seen(stage, up, down, initial)
        encoded = stage.encode(seen, state.stages.get(key, {}))
        up = _replaced(up, {field: _exchanged(up, field, seen, encoded) for field in seen.fields})
        if encoded.state:
            kept[key] = encoded.state
        if encoded.note is not None:
            notes.append(encoded.note)
    return up, ChannelState(kept, tuple(notes)) if kept or notes else NOTHING_KEPT


def decode(channel: Channel, up: object, down: object, initial: Tensors) -> object:
    """The record that a client's stages were given, as far as the server can tell.

    Raises:
        WireError: if what was sent cannot be unpacked.
    """
    for stage in reversed([stage for stage in channel if stage.packs]):
        changed = dict[str, Tensors]()
        for field, tensors in named(up):
            changed[field] = stage.decode(tensors, _counterparts(field, down, initial))
        try:
            up = _replaced(up, changed)
        except ValueError as error:  # a record may check its own content
            raise WireError(f"{name_of(type(up))}: {error}") from error
    return up


def wire(channel: Channel, schema: Schema) -> Schema:
    """The schema of the uplink's frames."""
    for stage in channel:
        schema = stage.wire(schema)
    return schema


def receive(channel: Channel, down: object) -> object:
    """The downlink record after all stages.

    Raises:
        PolicyError: if one of them refuses it.
    """
    for stage in channel:
        down = stage.receive(down)
    return down


def named(value: Any) -> Iterator[tuple[str, Tensors]]:
    """The fields of a record that hold named tensors."""
    for field in dataclasses.fields(value):
        tensors = getattr(value, field.name)
        if isinstance(tensors, Mapping) and tensors and all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            yield field.name, tensors


def _counterparts(field: str, down: object, initial: Tensors) -> Start:
    """The counterparts of one field's tensors."""
    received = dict(named(down))
    places = [received.pop(field, {}), *received.values()]

    def of(name: str, shape: tuple[int, ...]) -> Tensor | None:
        for place in places:
            if name in place and place[name].shape == shape:
                return place[name]
        if name not in initial or initial[name].dim() != len(shape):
            return None
        block = initial[name][tuple(slice(side) for side in shape)]  # a lower rank has the first rows or columns
        return block if block.shape == shape else None

    return of


def _seen(stage: Stage, up: object, down: object, initial: Tensors) -> Uplink:
    """What a stage sees of a record.

    Raises:
        PolicyError: if it promises protection and does not cover all of it.
    """
    kind = name_of(type(up))
    fields, start = dict[str, dict[str, Tensor]](), dict[str, dict[str, Tensor]]()
    for field, tensors in named(up):
        of = _counterparts(field, down, initial)
        for name, tensor in tensors.items():
            counterpart = of(name, tuple(tensor.shape))
            if stage.covers(tensor, counterpart):
                fields.setdefault(field, {})[name] = tensor
                if counterpart is not None:
                    start.setdefault(field, {})[name] = counterpart
    covered = {(field, name) for field, tensors in fields.items() for name in tensors}
    others = {"/".join(path): leaf for path, leaf in leaves(up) if path not in covered}
    if stage.protects and others:
        raise PolicyError(
            f"{kind} is not sent: the filter '{stage.describe()}' promises protection and does not cover "
            f"{', '.join(others)}; expected a record whose tensors are all covered: choose another algorithm or other "
            "settings of it, or leave out the filter ([[filters]])"
        )
    return Uplink(kind, fields, start, others)


def _exchanged(up: Any, field: str, seen: Uplink, encoded: Encoded) -> Tensors:
    """A field with what a stage made of it."""
    rest = {name: tensor for name, tensor in getattr(up, field).items() if name not in seen.fields[field]}
    return {**rest, **encoded.fields[field]}


def _replaced(up: Any, fields: Mapping[str, Tensors]) -> object:
    """The record with other named tensors."""
    return dataclasses.replace(up, **fields) if fields else up
