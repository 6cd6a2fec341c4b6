"""What a client keeps at its site from one round to the next, and the names that it is kept under.

private@3                 its private state after round 3; of the last two rounds in which it trained
channel@3                 beside it, what the stages of the channel keep (`celora.core.channel.ChannelState`)
received@2, personal@3    its `KeptModel` at the moments worth keeping
notes                     `Notes`
"""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from celora.tensors import Tensors
from celora.wire import Schema, pack, record, unpack

T = TypeVar("T")

Moment = Literal["received", "personal"]
"""When a client's model is scored: right after the download, or after the local training that follows it."""
MOMENTS: tuple[Moment, ...] = ("received", "personal")
NOTES = "notes"
"""The name of a client's `Notes`."""
ClientStore = MutableMapping[str, object]
"""Name -> a record or, as it comes from disk, the frame of one (`unpacked`, `frame_of`).

A value is never changed: a new value takes the place of the old one.
"""


@dataclass(frozen=True)
class StateKey:
    """What is kept once for each round: the private state, what the channel keeps, or the model of a moment.

    Attributes:
        round: 1, 2, …; a client that has never trained receives its first model at round 0.

    >>> StateKey("personal", 3).name
    'personal@3'
    >>> StateKey.parse("private@12"), StateKey.parse("notes")
    (StateKey(kind='private', round=12), None)
    """

    kind: Literal["private", "channel"] | Moment
    round: int

    @property
    def name(self) -> str:
        """The name in a store, in `Instruction.keep` and on disk."""
        return f"{self.kind}@{self.round}"

    @staticmethod
    def parse(name: str) -> "StateKey | None":
        """The key with this name; None where a name stands for something else, such as the notes."""
        kind, _, digits = name.partition("@")
        if not (digits.isascii() and digits.isdecimal()):
            return None
        match kind:
            case "private" | "channel" | "received" | "personal":
                return StateKey(kind, int(digits))
        return None


def private_states(names: Iterable[str]) -> list[StateKey]:
    """The keys of the private states in a store, oldest first."""
    return sorted(_of_kinds(names, "private"), key=lambda key: key.round)


def channel_states(names: Iterable[str]) -> list[StateKey]:
    """The keys of what the channel keeps in a store."""
    return _of_kinds(names, "channel")


def kept_models(names: Iterable[str]) -> list[StateKey]:
    """The keys of the models in a store."""
    return _of_kinds(names, *MOMENTS)


def _of_kinds(names: Iterable[str], *kinds: str) -> list[StateKey]:
    return [key for name in names if (key := StateKey.parse(name)) is not None and key.kind in kinds]


@record
class KeptModel:
    """All weights that a client predicts with at one moment; they stay in the client's store."""

    weights: Tensors


@record
class Notes:
    """What the client has been told; it is never sent."""

    lines: tuple[str, ...]


def notes_in(store: ClientStore, schema: Schema) -> tuple[str, ...]:
    """The notes in a store.

    Raises:
        WireError: if they are a frame that cannot be read.
    """
    return unpacked(Notes, store[NOTES], schema).lines if NOTES in store else ()


def unpacked(kind: type[T], kept: object, schema: Schema) -> T:
    """The record that is kept, whether it is kept as a record or as its frame.

    Raises:
        WireError: if it is a frame that cannot be read.
    """
    return unpack(kind, kept, schema) if isinstance(kept, bytes) else cast(T, kept)


def frame_of(kept: object, schema: Schema) -> bytes:
    """The frame of what is kept, for whoever needs bytes: the disk."""
    return kept if isinstance(kept, bytes) else pack(kept, schema)
