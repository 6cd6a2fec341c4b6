"""What a server and its clients' nodes say to each other; `celora.engines.remote_exchange` says when.

    server                                            node
    Request(job, "start", JobStart)           ── one frame ──►   reads its rows, loads its backbone
                                              ◄── one frame ──   Response(client, ClientFacts)     who is there
    Request(job, "instruction", Instruction)  ── one frame ──►   celora.core.client.answer
                                              ◄── one frame ──   Response(client, Reply)
    Request(job, "export", name)              ── one frame ──►   writes its adapter, at the site

A site's policy names the records by this module, as in "remote.ClientFacts".
"""

from collections.abc import Mapping

from celora.wire import record


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
