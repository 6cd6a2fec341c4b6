"""A site: it answers the server's requests with its own rows, keeps its private state on its own disk, and decides
itself what may leave.

    state/<federation>/<client>/<job>/start.bin    what the server said of the job: a site that restarts goes on with it
    state/<federation>/<client>/<job>/store/       private state and kept models (`celora.site.store`)
    state/<federation>/<client>/<job>/adapter/     the adapter, once the job is done
    state/ledger.jsonl                             every frame that left

Nothing in here knows what carries the frames.
"""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.channel import Channel, wire
from celora.core.client import answer, channel_state
from celora.core.client_state import KeptModel, notes_in, unpacked
from celora.core.learner import Learner
from celora.core.messages import Instruction, Reply
from celora.core.solve import solve
from celora.engines.remote import ClientFacts, JobStart, Request, Response
from celora.errors import CeloraError, FederationError, PolicyError, RunFolderError, WireError
from celora.site.ledger import Ledger
from celora.site.policy import Policy
from celora.site.store import SiteStore
from celora.tensors import Tensors
from celora.track.disk import folder_name, owners, put, writing
from celora.wire import Schema, name_of, pack, unpack

FREE = (PolicyError, FederationError, WireError)
"""Errors whose words tell nothing of the rows and folders here; of all others the server is told the kind alone."""
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}/[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""federation/job; part of a path, so it must not lead anywhere else."""
LAST = 10**9
"""No run has more rounds."""


class JobContext(Protocol):
    """A client's place in a job: all that its updates need."""

    @property
    def facts(self) -> ClientFacts:
        """What the server must know of the client."""

    @property
    def algorithm(self) -> AnyAlgorithm:
        """What is run."""

    @property
    def channel(self) -> Channel:
        """The stages that the experiment names."""

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0, as the server has them: the schema of the frames."""

    def learner(self, round: int) -> Learner:
        """The client's learner in a round."""

    def export(self, folder: Path, weights: Tensors) -> None:
        """Write these weights as an adapter that others can load."""


@dataclass
class Site:
    """Answers requests; a callable from frame to frame that raises nothing the server need not know.

    Args:
        client: whom this site speaks for.
        state: the folder of the site's choice; only its owner can read what is written there.
        enter: reads the rows and the backbone for a job.
        ledger: keeps account of what leaves; None: nobody does (simulation).
        socket: bytes sent and received on the way to the server, so far.
        say: told what happens here, a line each.

    Attributes:
        over: whether the server has said that it has finished.
    """

    client: ClientId
    state: Path
    policy: Policy
    enter: Callable[[JobStart], JobContext]
    ledger: Ledger | None
    socket: Callable[[], tuple[int, ...]] = tuple
    log: Callable[[str], None] = lambda text: None
    over: bool = False
    _contexts: dict[str, JobContext] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with writing(self.state):
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)

    def __call__(self, frame: bytes) -> bytes:
        """The answer to a request; of what went wrong, the words."""
        job, round, kind, body = "-/-", 0, "", b""
        try:
            request = unpack(Request, frame)
            if not JOB.fullmatch(request.job):
                raise FederationError(
                    f"found the job {request.job!r}, expected federation/job of letters, digits, . _ -"
                )
            job = request.job
            match request.kind:
                case "start":
                    kind, body = self._start(job, request.body)
                case "instruction":
                    instruction = unpack(Instruction, request.body)
                    if not 1 <= instruction.round <= LAST:  # the ledger counts by it
                        raise FederationError(f"found an instruction for no round, expected one of 1 to {LAST}")
                    round = instruction.round
                    kind, body = self._instruct(job, instruction)
                case "export":
                    self._export(job, request.body.decode())
                case "end":
                    self.over = True
                    self.log(f"{job.partition('/')[0]}: the server has finished")
                case _:
                    raise FederationError(f"found a request of kind {request.kind!r}: update celora on the older side")
            found = self._left(job, round, kind, Response(self.client, body, None, self.socket()))
        except Exception as problem:
            self.log(f"not sent: {problem}" if isinstance(problem, PolicyError) else f"failed: {_words(problem)}")
            error = _told(problem)
            found = pack(Response(self.client, b"", error.encode(errors="replace").decode(), self.socket()))
            with suppress(RunFolderError):  # a full disk; the notice has no content, and the server must know of it
                self._note(job, round, "error", found)
        return found

    def _left(self, job: str, round: int, kind: str, response: Response) -> bytes:
        """The frame of an answer that the policy can afford, after the ledger knows of it."""
        frame = pack(response)
        if self.ledger is not None:
            self.policy.afford(len(frame), round, self.ledger, job.partition("/")[0])
        self._note(job, round, kind or "remote.Response", frame)
        return frame

    def _note(self, job: str, round: int, kind: str, frame: bytes) -> None:
        if self.ledger is not None:
            federation, _, name = job.partition("/")
            self.ledger.append(federation=federation, job=name, client=self.client, round=round, kind=kind, frame=frame)

    def _start(self, job: str, body: bytes) -> tuple[str, bytes]:
        start = unpack(JobStart, body)
        job_context = self._entered(start)
        self.policy.admit(name_of(ClientFacts), job_context.facts)
        if start.clients:  # else this was only a question
            folder = self._folder(job)
            with writing(folder):
                for place in (folder.parent.parent, folder.parent, folder):
                    place.mkdir(mode=0o700, exist_ok=True)
                put(folder / "start.tmp", body, owners)
                os.replace(folder / "start.tmp", folder / "start.bin")
            self._contexts = {job: job_context}  # of other jobs what it takes to take part again is on disk
            self.log(f"{job}: {start.label}, {job_context.facts.rows.get('train', 0)} training rows")
        return name_of(ClientFacts), pack(job_context.facts)

    def _entered(self, start: JobStart) -> JobContext:
        """The rows and the backbone for a job that the policy accepts, as it is now."""
        job_context = self.enter(start)
        self.policy.accept(job_context.algorithm, job_context.facts.rows.get("train", 0))
        self.policy.channel(job_context.channel)
        return job_context

    def _context(self, job: str) -> JobContext:
        """The context of a job that has begun, here or in an earlier process."""
        if job not in self._contexts:
            kept = self._folder(job) / "start.bin"
            if not kept.exists():
                raise FederationError(f"the job {job} has not begun at this site")
            self._contexts[job] = self._entered(unpack(JobStart, kept.read_bytes()))
        return self._contexts[job]

    def _store(self, job: str, job_context: JobContext) -> SiteStore:
        return SiteStore(self._folder(job) / "store", Schema.of(job_context.initial))

    def _instruct(self, job: str, instruction: Instruction) -> tuple[str, bytes]:
        """An update: train, keep, and only then let something leave."""
        job_context = self._context(job)
        schema, learner = Schema.of(job_context.initial), job_context.learner(instruction.round)
        channel = self.policy.channel(job_context.channel)
        with self._store(job, job_context) as kept:
            store = dict[str, object](kept)
            [reply] = solve([(learner, answer(job_context.algorithm, learner, instruction, store, schema, channel))])
            if isinstance(reply, Exception):
                raise reply
            kept.keep(store)
        self._tell(notes_in(store, schema))
        self._tell(channel_state(store, instruction.round, schema).notes)
        kind = name_of(Reply)
        if reply.frame:
            info = job_context.algorithm.info
            kind = name_of(info.up)
            up: Any = unpack(info.up, reply.frame, wire(channel, schema))
            self.policy.admit(kind, up)
        self.policy.admit(name_of(Reply), reply)
        score = reply.scores.get("personal", {}).get("score")
        self.log(
            f"round {instruction.round}: {instruction.action}"
            + (f", validation {score:.3f}" if score is not None else "")
        )
        return kind, pack(reply)

    def _tell(self, notes: Iterable[str]) -> None:
        """What is for this site alone; each note once."""
        for note in [note for note in notes if note not in self._told]:
            self._told.add(note)
            self.log(note)

    def _export(self, job: str, name: str) -> None:
        job_context, folder = self._context(job), self._folder(job) / "adapter"
        with self._store(job, job_context) as kept:
            if name not in kept:
                raise WireError(f"there is no model {name} on this site's store")
            job_context.export(folder, unpacked(KeptModel, kept[name], Schema.of(job_context.initial)).weights)
        self.log(f"adapter of {name}: {folder}")

    def _folder(self, job: str) -> Path:
        return self.state / job_folder(self.client, job)


def _words(problem: Exception) -> str:
    return str(problem) if isinstance(problem, CeloraError) else f"{type(problem).__name__}: {problem}"


def _told(problem: Exception) -> str:
    """What the server is told of a problem."""
    if isinstance(problem, FREE):
        return str(problem)
    if isinstance(problem, RunFolderError) and isinstance(problem.__cause__, OSError):
        return f"this site cannot keep its state: {problem.__cause__.strerror}"
    return f"{type(problem).__name__}: see this site's log"


def job_folder(client: ClientId, job: str) -> Path:
    """Where a job's files lie in a site's folder."""
    federation, _, name = job.partition("/")
    return Path(federation) / folder_name(client) / name
