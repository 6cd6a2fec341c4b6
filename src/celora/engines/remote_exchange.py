"""Clients on other machines: an `Exchange` over anything that carries bytes to nodes and back.

The server names the clients, and learns by asking which node speaks for which of them. A node that restarts, or comes
back under another id, is asked again, and what it still owes is sent to it once more: an update may be asked for twice
and gives the same reply (`celora.core.client`). Nothing here knows what carries the bytes (`celora.engines.transport`);
what they say is in `celora.engines.remote`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from celora.core.algorithm import ClientId
from celora.core.messages import Instruction, Reply
from celora.engines.remote import ClientFacts, JobStart, Request, Response
from celora.engines.transport import NodeId, Transport
from celora.errors import QuorumError, WireError
from celora.wire import pack, unpack

DEADLINE = 3600.0
"""Seconds that a round waits where there is no `plan.deadline`: no reply is waited for without end."""

FAILURES = 3
"""Times that a node may fail before it is left alone for the round."""


@dataclass
class _PendingRequest:
    node: NodeId
    since: str
    client: ClientId | None  # None: a `JobStart`, which asks who is there


@dataclass
class Remote:
    """The clients behind a `Transport`, for a session of many jobs.

    Args:
        names: node -> the client whose key it has; None where nodes are believed (`--insecure`, simulation).
        patience: seconds after which a client whose node has gone is given up for the round.
        poll: seconds between looks at the transport.
        log: takes a line for whatever happens to a node.

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
    _job: str = ""
    _start: bytes = b""  # the frame that begins the job
    _begun: dict[NodeId, tuple[str, bytes]] = field(default_factory=dict)  # since when there, the job's frame
    _nodes: dict[ClientId, NodeId] = field(default_factory=dict)
    _gone: dict[ClientId, float] = field(default_factory=dict)  # since when
    _counted: dict[ClientId, tuple[int, int]] = field(default_factory=dict)  # bytes on its sockets so far
    _failures: Counter[NodeId] = field(default_factory=Counter)  # of its transport, in this round
    _announced: dict[ClientId, str] = field(default_factory=dict)  # its row counts, as logged

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

        self._bring({}, seconds, all_here)
        if not self.facts:
            if not self.refused:
                raise QuorumError(f"no site has joined within {seconds:g} s. Start the sites, and resume the run")
            why = "; ".join(f"{client}: {reason}" for client, reason in sorted(self.refused.items()))
            raise QuorumError(f"no site takes part ({why}). Mend that, and resume the run")

    def __call__(self, instructions: Mapping[ClientId, Instruction]) -> dict[ClientId, Reply]:
        """Send each client its instruction and bring back the replies that come within the deadline."""
        seconds = min((instruction.deadline or DEADLINE for instruction in instructions.values()), default=0.0)
        requests = {c: Request(self._job, "instruction", pack(instruction)) for c, instruction in instructions.items()}
        responses = self._bring(requests, seconds)
        return {client: _reply(response) for client, response in responses.items()}

    def export(self, clients: Iterable[ClientId], name: str, seconds: float = DEADLINE) -> dict[ClientId, str]:
        """Let every client write its kept model at its site; client -> what went wrong, where something did."""
        responses = self._bring(dict.fromkeys(clients, Request(self._job, "export", name.encode())), seconds)
        problems = {c: found if isinstance(found, str) else found.error for c, found in responses.items()}
        return {client: problem for client, problem in problems.items() if problem is not None}

    def end(self, seconds: float = 10.0) -> None:
        """Tell the nodes that are there that nothing more will come."""
        here = [client for client, node in self._nodes.items() if node in self.transport.nodes()]
        self._bring(dict.fromkeys(here, Request(self._job, "end", b"")), seconds)

    def _bring(
        self, requests: Mapping[ClientId, Request], seconds: float, until: Callable[[], bool] = lambda: True
    ) -> dict[ClientId, "Response | str"]:
        """Send requests and bring back responses, or what happened instead, until all are here or the time is up."""
        end, done = time.monotonic() + seconds, dict[ClientId, Response | str]()
        frames = {client: pack(request) for client, request in requests.items()}
        pending: dict[str, _PendingRequest] = {}
        self.sockets.clear()
        self._failures.clear()
        while time.monotonic() < end:
            online = self.transport.nodes()
            for name, found in self.transport.collect(list(pending)).items():  # a node may have answered and gone since
                self._receive(pending.pop(name), found, done)
            for name in [name for name, request in pending.items() if online.get(request.node) != request.since]:
                self.transport.forget([name])  # its node has gone, or has come back and knows nothing of it
                del pending[name]
            self._ask_who(online, pending, end)
            for client in [client for client in frames if client not in done]:
                self._send(client, frames[client], online, pending, done, end)
            if len(done) == len(frames) and until():
                break
            time.sleep(self.poll)
        self.transport.forget(list(pending))
        for client in frames:
            if client in self._gone and client not in done:
                done[client] = f"its node has been gone for {time.monotonic() - self._gone[client]:.0f} s"
        return done

    def _ask_who(self, online: Mapping[NodeId, str], pending: dict[str, _PendingRequest], end: float) -> None:
        """Begin the job with every node that has not begun it yet."""
        asked = {request.node for request in pending.values() if request.client is None}
        for node, since in online.items():
            if self._begun.get(node) != (since, self._start) and node not in asked:
                name = self.transport.send(node, self._start, end - time.monotonic())
                pending[name] = _PendingRequest(node, since, None)

    def _send(
        self,
        client: ClientId,
        frame: bytes,
        online: Mapping[NodeId, str],
        pending: dict[str, _PendingRequest],
        done: dict[ClientId, "Response | str"],
        end: float,
    ) -> None:
        """Send a client its request if its node is there and ready; give it up if its node stays away."""
        if client in self.refused:
            done[client] = self.refused[client]
            return
        node = self._nodes.get(client)
        if node is None or node not in online:
            since = self._gone.setdefault(client, time.monotonic())
            if time.monotonic() - since > self.patience:
                done[client] = f"its node has been gone for {self.patience:g} s"
            return
        if self._gone.pop(client, None) is not None:
            self.log(f"{client} is back")
        ready = self._begun.get(node) == (online[node], self._start)
        if ready and all(request.client != client for request in pending.values()):
            name = self.transport.send(node, frame, end - time.monotonic())
            pending[name] = _PendingRequest(node, online[node], client)

    def _receive(self, request: _PendingRequest, found: bytes | str, done: dict[ClientId, "Response | str"]) -> None:
        """Take what has come back for a request."""
        if isinstance(found, str):  # its transport failed: the node is asked again, so no instruction is lost
            self._failures[request.node] += 1
            self._begun.pop(request.node, None)
            if self._failures[request.node] >= FAILURES:
                self._begun[request.node] = request.since, self._start
                self.log(f"node {request.node} fails again and again: {found}")
                if request.client is not None:
                    done[request.client] = f"its node failed {FAILURES} times: {found}"
            return
        try:
            response = unpack(Response, found)
            facts = unpack(ClientFacts, response.body) if request.client is None and response.error is None else None
        except WireError as error:
            self._ignore(request, f"node {request.node} sent what cannot be read: {error}", str(error), done)
            return
        expected = self.names(request.node) if self.names else response.client
        if response.client != expected or request.client not in (None, response.client):
            named = request.client or expected
            wrong = f"node {request.node} speaks for {response.client!r}, expected {named!r}: ignored"
            self._ignore(request, wrong, wrong, done)
            return
        self._count(response)
        if request.client is not None:
            done[request.client] = response
            return
        self._begun[request.node] = request.since, self._start
        self._admit(request.node, response, facts)

    def _ignore(self, request: _PendingRequest, line: str, why: str, done: dict[ClientId, "Response | str"]) -> None:
        """There is nothing to wait for from this node, which would else be asked again and again."""
        self._begun[request.node] = request.since, self._start
        if request.client is not None:
            done[request.client] = why
        self.log(line)

    def _admit(self, node: NodeId, response: Response, facts: ClientFacts | None) -> None:
        """Take a node's word for which client it has; without facts it has said why it cannot take part."""
        client = response.client
        if (other := self._nodes.get(client)) not in (None, node) and other in self.transport.nodes():
            self.log(f"node {node} speaks for {client}, as node {other} does already: ignored")
            return
        self._nodes[client] = node
        if facts is None:
            self.refused[client] = response.error or ""
            self.log(f"{client} cannot take part: {response.error}")
            return
        self.refused.pop(client, None)
        self.facts[client] = facts
        rows = ", ".join(f"{n} {split}" for split, n in facts.rows.items())
        if self._announced.get(client) != rows:  # it is asked anew for each job
            self._announced[client] = rows
            self.log(f"{client} has joined: {rows}")

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
