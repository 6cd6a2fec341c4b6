"""Clients on other machines: an `Exchange` over anything that carries bytes to nodes and back.

    server                                            node
    Request(job, "start", JobStart)           ── one frame ──►   reads its rows, loads its backbone
                                              ◄── one frame ──   Response(client, ClientFacts)     who is there
    Request(job, "instruction", Instruction)  ── one frame ──►   celora.core.client.answer
                                              ◄── one frame ──   Response(client, Reply)
    Request(job, "export", name)              ── one frame ──►   writes its adapter, at the site

Clients are named by us; which node speaks for which client is learned by asking. A node that restarts, or comes back
under another id, is asked again, and what it still owes is sent to it once more: a turn may be asked for twice and
gives the same reply (`celora.core.client`). Nothing here knows what carries the bytes: see `celora.engines.transport`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from celora.core.algorithm import ClientId
from celora.core.messages import Instruction, Reply
from celora.engines.transport import NodeId, Transport
from celora.errors import QuorumError, WireError
from celora.wire import pack, record, unpack

DEADLINE = 3600.0
"""Seconds a round waits where `plan.deadline` says nothing: no reply is waited for without end."""

FAILURES = 3
"""Times that a node may fail before it is left alone for the round."""


@record
class Request:
    """Server to node.

    Attributes:
        job: one algorithm with one seed in one federation; the node keeps private state by it.
        kind: "start", "instruction", "export" or "end".
        body: `JobStart`, `Instruction`, the name of the model to export in UTF-8, or nothing.
    """

    job: str
    kind: str
    body: bytes


@record
class JobStart:
    """What a node needs to know of a job.

    Attributes:
        config: one algorithm with one seed, resolved, as TOML; data, folders and downloads are the node's to decide.
        label: an algorithm's name or the label of an override.
        backbone: SHA-256 of the server's backbone; the node's must be equal.
        agreement: what the clients have agreed on, packed (`celora.core.task.Task`); empty as long as they are asked.
        clients: all clients of the job; empty as long as they are being asked.
    """

    config: str
    label: str
    backbone: str
    agreement: bytes
    clients: tuple[str, ...]


@record
class ClientFacts:
    """What a node tells of its client before training.

    Attributes:
        rows: split -> number of rows; no training rows: the client cannot take part.
        proposal: its part in what the clients must agree on, packed, such as the labels of its rows; may be empty.
        baseline: test score of the best constant answer, such as its most frequent training label.
        data: SHA-256 over its rows.
        backbone: SHA-256 of its backbone.
        version: of celora.
    """

    rows: Mapping[str, int]
    proposal: bytes
    baseline: float | None
    data: str
    backbone: str
    version: str


@record
class Response:
    """Node to server.

    Attributes:
        client: who speaks.
        body: `ClientFacts` or `Reply`, packed; empty where `error` says why there is none.
        error: what went wrong at the node, or what its policy refused to send.
        socket: bytes that the node's sockets have sent and received since its process began, where they can be counted.
    """

    client: str
    body: bytes
    error: str | None
    socket: tuple[int, ...]


@dataclass
class _PendingRequest:
    node: NodeId
    since: str
    client: ClientId | None  # None: a `JobStart`, which asks who is there


@dataclass
class Remote:
    """The clients behind a `Transport`; lasts for a session of many jobs.

    Args:
        names: node -> the client whose key it has; None where nodes are believed (`--insecure`, simulation).
        patience: seconds after which a client whose node has gone is given up for the round.
        poll: seconds between looks at the transport.
        say: told what happened to a node, a line each.

    Attributes:
        facts: client -> what its node told at the last `start_job`, or after.
        refused: client -> why its node cannot take part in the job.
        sockets: client -> bytes its node sent and received between its last two responses, where it counts them.
    """

    transport: Transport
    names: Callable[[NodeId], ClientId | None] | None = None
    patience: float = 30.0
    poll: float = 0.05
    log: Callable[[str], None] = lambda text: None
    facts: dict[ClientId, ClientFacts] = field(default_factory=dict)
    refused: dict[ClientId, str] = field(default_factory=dict)
    sockets: dict[ClientId, tuple[int, int]] = field(default_factory=dict)
    _start: bytes = b""
    _job: str = ""
    _met: dict[NodeId, tuple[str, bytes]] = field(default_factory=dict)
    _home: dict[ClientId, NodeId] = field(default_factory=dict)
    _gone: dict[ClientId, float] = field(default_factory=dict)
    _counted: dict[ClientId, tuple[int, int]] = field(default_factory=dict)
    _failures: Counter[NodeId] = field(default_factory=Counter)  # of its carrier, in this round
    _said: dict[ClientId, str] = field(default_factory=dict)

    def start_job(self, job: str, start: JobStart, expected: Iterable[ClientId] | int, seconds: float) -> None:
        """Begin a job with every node that is there or comes in time; results are in `facts` and `refused`.

        Args:
            expected: whom to wait for, or how many.

        Raises:
            QuorumError: if nobody has come.
        """
        self._job, self._start = job, pack(Request(job, "start", pack(start)))
        self.facts.clear()
        self.refused.clear()
        wanted = expected if isinstance(expected, int) else set(expected)

        def all_here() -> bool:
            come = self.facts.keys() | self.refused.keys()
            return len(come) >= wanted if isinstance(wanted, int) else wanted <= come

        self._work({}, seconds, all_here)
        if not self.facts:
            if not self.refused:
                raise QuorumError(f"no site has joined within {seconds:g} s. Start the sites, and resume the run")
            why = "; ".join(f"{client}: {reason}" for client, reason in sorted(self.refused.items()))
            raise QuorumError(f"no site takes part ({why}). Mend that, and resume the run")

    def __call__(self, instructions: Mapping[ClientId, Instruction]) -> dict[ClientId, Reply]:
        """Send each client its instruction and bring back the replies that come within the deadline."""
        seconds = min((instruction.deadline or DEADLINE for instruction in instructions.values()), default=0.0)
        responses = self._work(
            {c: Request(self._job, "instruction", pack(instruction)) for c, instruction in instructions.items()},
            seconds,
        )
        return {client: _reply(response) for client, response in responses.items()}

    def export(self, clients: Iterable[ClientId], name: str, seconds: float = DEADLINE) -> dict[ClientId, str]:
        """Let every client write its kept model at its site; client -> what went wrong, where something did."""
        wanted = Request(self._job, "export", name.encode())
        responses = self._work(dict.fromkeys(clients, wanted), seconds)
        problems = {c: found if isinstance(found, str) else found.error for c, found in responses.items()}
        return {client: problem for client, problem in problems.items() if problem is not None}

    def end(self, seconds: float = 10.0) -> None:
        """Tell the nodes that are there that nothing more will come."""
        here = [client for client, node in self._home.items() if node in self.transport.nodes()]
        self._work(dict.fromkeys(here, Request(self._job, "end", b"")), seconds)

    def _work(
        self, outgoing: Mapping[ClientId, Request], seconds: float, until: Callable[[], bool] = lambda: True
    ) -> dict[ClientId, "Response | str"]:
        """Carry outgoing and bring back responses, or what happened instead, until all are here or the time is up."""
        end, done = time.monotonic() + seconds, dict[ClientId, Response | str]()
        frames = {client: pack(request) for client, request in outgoing.items()}
        requests: dict[str, _PendingRequest] = {}
        self.sockets.clear()
        self._failures.clear()
        while time.monotonic() < end:
            online = self.transport.nodes()
            for name, found in self.transport.collect(
                list(requests)
            ).items():  # a node may have answered and gone since
                self._take(requests.pop(name), found, done)
            for name in [name for name, request in requests.items() if online.get(request.node) != request.since]:
                self.transport.forget([name])  # its node has gone, or has come back and knows nothing of it
                del requests[name]
            self._ask_who(online, requests, end)
            for client in [client for client in frames if client not in done]:
                self._send(client, frames[client], online, requests, done, end)
            if len(done) == len(frames) and until():
                break
            time.sleep(self.poll)
        self.transport.forget(list(requests))
        for client in frames:
            if client in self._gone and client not in done:
                done[client] = f"its node has been gone for {time.monotonic() - self._gone[client]:.0f} s"
        return done

    def _ask_who(self, online: Mapping[NodeId, str], requests: dict[str, _PendingRequest], end: float) -> None:
        """Begin the job with every node that has not begun it yet."""
        asked = {request.node for request in requests.values() if request.client is None}
        for node, since in online.items():
            if self._met.get(node) != (since, self._start) and node not in asked:
                name = self.transport.send(node, self._start, end - time.monotonic())
                requests[name] = _PendingRequest(node, since, None)

    def _send(
        self,
        client: ClientId,
        frame: bytes,
        online: Mapping[NodeId, str],
        requests: dict[str, _PendingRequest],
        done: dict[ClientId, "Response | str"],
        end: float,
    ) -> None:
        """Send a client its call if its node is there and ready; give it up if its node stays away."""
        if client in self.refused:
            done[client] = self.refused[client]
            return
        node = self._home.get(client)
        if node is None or node not in online:
            since = self._gone.setdefault(client, time.monotonic())
            if time.monotonic() - since > self.patience:
                done[client] = f"its node has been gone for {self.patience:g} s"
            return
        if self._gone.pop(client, None) is not None:
            self.log(f"{client} is back")
        ready = self._met.get(node) == (online[node], self._start)
        if ready and all(request.client != client for request in requests.values()):
            requests[self.transport.send(node, frame, end - time.monotonic())] = _PendingRequest(
                node, online[node], client
            )

    def _take(self, request: _PendingRequest, found: bytes | str, done: dict[ClientId, "Response | str"]) -> None:
        """What came back for a letter."""
        if isinstance(found, str):  # its carrier failed: the node is asked again, an instruction is not lost
            self._failures[request.node] += 1
            self._met.pop(request.node, None)
            if self._failures[request.node] >= FAILURES:
                self._met[request.node] = request.since, self._start
                self.log(f"node {request.node} fails again and again: {found}")
                if request.client is not None:
                    done[request.client] = f"its node failed {FAILURES} times: {found}"
            return
        try:
            response = unpack(Response, found)
            facts = unpack(ClientFacts, response.body) if request.client is None and response.error is None else None
        except WireError as error:
            if request.client is not None:
                done[request.client] = str(error)
            self._met[request.node] = request.since, self._start  # nothing to wait for from this one
            self.log(f"node {request.node} sent what cannot be read: {error}")
            return
        expected = self.names(request.node) if self.names else response.client
        if response.client != expected or request.client not in (None, response.client):
            self._met[request.node] = request.since, self._start
            wrong = (
                f"node {request.node} speaks for {response.client!r}, expected {request.client or expected!r}: ignored"
            )
            if request.client is not None:  # else it would be asked again and again
                done[request.client] = wrong
            self.log(wrong)
            return
        self._count(response)
        if request.client is not None:
            done[request.client] = response
            return
        self._met[request.node] = request.since, self._start
        if (held := self._home.get(response.client)) not in (None, request.node) and held in self.transport.nodes():
            self.log(f"node {request.node} speaks for {response.client}, as node {held} does already: ignored")
            return
        self._home[response.client] = request.node
        if facts is None:
            self.refused[response.client] = response.error or ""
            self.log(f"{response.client} cannot take part: {response.error}")
        else:
            self.refused.pop(response.client, None)
            rows = ", ".join(f"{n} {split}" for split, n in facts.rows.items())
            if self._said.get(response.client) != rows:  # it is asked anew for each job
                self._said[response.client] = rows
                self.log(f"{response.client} has joined: {rows}")
            self.facts[response.client] = facts

    def _count(self, response: Response) -> None:
        """Bytes on the node's sockets since its last response; a process that began anew counts from 0 again."""
        if len(response.socket) != 2:
            return
        sent, received = response.socket
        before = self._counted.get(response.client, (0, 0))
        if sent < before[0] or received < before[1]:
            before = 0, 0
        up, down = self.sockets.get(response.client, (0, 0))
        self.sockets[response.client] = up + sent - before[0], down + received - before[1]
        self._counted[response.client] = sent, received


def _reply(found: Response | str) -> Reply:
    if isinstance(found, str):
        return Reply(b"", {}, found)
    if found.error is not None:
        return Reply(b"", {}, found.error)
    try:
        return unpack(Reply, found.body)
    except WireError as error:
        return Reply(b"", {}, str(error))
