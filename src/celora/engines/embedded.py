"""All clients in this process. Frames are really packed and unpacked; nothing else is shared but the backbone."""

import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.client import answer
from celora.core.learner import Learner, Solve, solve
from celora.core.messages import Notes, Order, Reply, Shelf, opened
from celora.errors import RunFolderError
from celora.fields import Whole, setting, settings
from celora.wire import Schema

World = Callable[[ClientId, int], Learner]
"""A client's learner in a round."""
REPLIES = 16 * 2**20
"""Bytes of a round's reply frames that are held in memory; the rest lies in a temporary file."""


@settings
class Engine:
    """How the clients are run on this machine; no result depends on it."""

    state_mb: Whole = setting(32, "MB of clients' states held in memory; those of other clients lie in the run folder")


class Embedded:
    """An `Exchange` that runs the clients here, one after another.

    A client that raises is a client that did not deliver: its reply names the error, and its shelf is as it was. After
    `Order.deadline` seconds no further client is started.

    Args:
        shelves: what each client keeps. A shelf that changed is assigned, so that whoever keeps it knows.

    Attributes:
        notes: client -> what it was told at its site, of the clients that had a turn here.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        world: World,
        shelves: MutableMapping[ClientId, Shelf],
        schema: Schema,
        solve: Solve = solve,
    ) -> None:
        self.algorithm, self.world, self.shelves, self.schema, self.solve = (
            algorithm,
            world,
            shelves,
            schema,
            solve,
        )
        self.notes: dict[ClientId, tuple[str, ...]] = {}

    def __call__(self, orders: Mapping[ClientId, Order]) -> "Replies":
        """Run each client's turn."""
        began = time.monotonic()
        replies = Replies()
        for client, order in orders.items():
            if order.deadline is not None and time.monotonic() - began > order.deadline:
                break
            try:
                learner, kept = self.world(client, order.round), self.shelves.get(client, {})
            except Exception as error:
                replies.add(client, _failed(error))
                continue
            shelf = dict(kept)
            turn = answer(self.algorithm, learner, order, shelf, self.schema)
            (value,) = self.solve([(learner, turn)])
            if isinstance(value, Exception):
                replies.add(client, _failed(value))
                continue
            replies.add(client, value)
            if "notes" in shelf:
                self.notes[client] = opened(Notes, shelf["notes"], self.schema).lines
            if shelf != kept:
                self.shelves[client] = shelf
        return replies


class Replies(Mapping[ClientId, Reply]):
    """A round's replies in the order they came. Beyond `REPLIES` bytes their frames lie in a temporary file."""

    def __init__(self) -> None:
        self._replies: dict[ClientId, Reply] = {}
        self._places: dict[ClientId, tuple[int, int]] = {}
        self._room = REPLIES
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the replies
        weakref.finalize(self, self._file.close)

    def add(self, client: ClientId, reply: Reply) -> None:
        """Take a client's reply; one for each client.

        Raises:
            RunFolderError: if the disk is full.
        """
        self._room -= len(reply.frame)
        if self._room < 0 and reply.frame:
            try:
                self._places[client] = self._file.seek(0, os.SEEK_END), len(reply.frame)
                self._file.write(reply.frame)
                self._file.flush()
            except OSError as error:
                where = f"a temporary file in {tempfile.gettempdir()}"
                raise RunFolderError(f"cannot write {where}: {error.strerror}; free some space and resume") from error
            reply = replace(reply, frame=b"")
        self._replies[client] = reply

    def __getitem__(self, client: ClientId) -> Reply:
        reply = self._replies[client]
        if client not in self._places:
            return reply
        at, size = self._places[client]
        self._file.seek(at)
        return replace(reply, frame=self._file.read(size))

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._replies)

    def __len__(self) -> int:
        return len(self._replies)


def _failed(error: Exception) -> Reply:
    text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()  # a file's name may be no Unicode
    return Reply(b"", {}, text)
