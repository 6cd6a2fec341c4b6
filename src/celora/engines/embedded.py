"""All clients in this process. Frames are really packed and unpacked; nothing else is shared but the backbone."""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.channel import Channel
from celora.core.client import answer
from celora.core.client_state import ClientStore, notes_in
from celora.core.learner import Learner
from celora.core.messages import Instruction, Reply
from celora.core.problems import ClientUpdate
from celora.core.solve import Solve, solve, solve_together
from celora.errors import RunFolderError
from celora.fields import Count, Whole, setting, settings
from celora.lazy import torch
from celora.wire import Schema

Learners = Callable[[ClientId, int], Learner]
"""A client's learner in a round."""
REPLIES = 16 * 2**20
"""Bytes of a round's reply frames that are held in memory; the rest lies in a temporary file."""


_COHORT = {"cpu": 16, "cuda": 512}
"""Clients whose updates are in hand at once: enough to find batches of like length among them."""


@settings
class EngineSettings:
    """How the work is done; the results are the same but for rounding."""

    group: Count | None = setting(None, "clients whose rows may share a pass; 1: one after another; by default many")
    cache_mb: Whole = setting(
        1024, "MB of activations below the first adapted layer in memory; the rest in a file; 0: none"
    )
    inputs_mb: Whole = setting(256, "MB of token ids and decoded images in memory; others are made again when needed")
    state_mb: Whole = setting(32, "MB of clients' states held in memory; those of other clients lie in the run folder")

    def solver(self, device: torch.device) -> tuple[Solve, int]:
        """What runs the updates on this device, and how many it is to be given at once."""
        cohort = self.group or _COHORT.get(device.type, 1)
        return (solve if cohort == 1 else solve_together), cohort


class Embedded:
    """An `Exchange` that runs the clients here: `cohort` of them at a time, in the order of the instructions.

    A client that raises is a client that did not deliver: its reply names the error, and its store is as it was. After
    `Instruction.deadline` seconds no further client is started; instructions with a deadline run one after another, so
    that one slow client makes no other one late.

    Args:
        stores: what each client keeps. A store that changed is assigned, so that whoever keeps it knows.
        channel: the stages that what each client sends goes through.

    Attributes:
        notes: client -> what it was told at its site, of the clients that trained here.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        learners: Learners,
        stores: MutableMapping[ClientId, ClientStore],
        schema: Schema,
        solve: Solve = solve,
        cohort: int = 1,
        channel: Channel = (),
    ) -> None:
        self.algorithm, self.learners, self.stores, self.schema, self.solve = (
            algorithm,
            learners,
            stores,
            schema,
            solve,
        )
        self.cohort, self.channel = cohort, channel
        self.notes: dict[ClientId, tuple[str, ...]] = {}

    def __call__(self, instructions: Mapping[ClientId, Instruction]) -> Replies:
        """Run each client's update."""
        began = time.monotonic()
        replies, waiting = Replies(), list(instructions)
        while waiting:
            deadline = instructions[waiting[0]].deadline
            if deadline is not None and time.monotonic() - began > deadline:
                break
            count = self.cohort if deadline is None else 1
            cohort, waiting = waiting[:count], waiting[count:]
            for client, reply in self._run({client: instructions[client] for client in cohort}).items():
                replies.add(client, reply)
        return replies

    def _run(self, instructions: Mapping[ClientId, Instruction]) -> dict[ClientId, Reply]:
        """The updates of one cohort."""
        replies: dict[ClientId, Reply] = {}
        jobs: dict[ClientId, tuple[Learner, ClientUpdate[Reply]]] = {}
        kept: dict[ClientId, ClientStore] = {}
        stores: dict[ClientId, ClientStore] = {}
        for client, instruction in instructions.items():
            try:
                learner, kept[client] = self.learners(client, instruction.round), self.stores.get(client, {})
            except Exception as error:
                replies[client] = _failed(error)
                continue
            stores[client] = dict(kept[client])
            steps = answer(self.algorithm, learner, instruction, stores[client], self.schema, self.channel)
            jobs[client] = learner, steps
        for client, value in zip(jobs, self.solve(list(jobs.values())), strict=True):
            if isinstance(value, Exception):
                replies[client] = _failed(value)
                continue
            replies[client] = value
            if notes := notes_in(stores[client], self.schema):
                self.notes[client] = notes
            if stores[client] != kept[client]:
                self.stores[client] = stores[client]
        return {client: replies[client] for client in instructions}


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
