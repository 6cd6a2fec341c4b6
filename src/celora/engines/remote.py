"""Clients on other machines: an `Exchange` over anything that carries bytes to nodes and back.

    server                                            node
    Call(job, "begin", Begin)   ── one frame ──►      reads its rows, loads its backbone
                                ◄── one frame ──      Answer(client, Facts)          who is there, and with what
    Call(job, "order", Order)   ── one frame ──►      celora.core.client.answer
                                ◄── one frame ──      Answer(client, Reply)
    Call(job, "export", name)   ── one frame ──►      writes its adapter, at the site

Clients are named by us; which node speaks for which client is learned by asking. A node that restarts, or comes back under
another id, is asked again, and what it still owes is sent to it once more: a turn may be asked for twice and gives the
same reply (`celora.core.client`). Nothing here knows what carries the bytes: see `celora.engines.flower`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from celora.core.algorithm import ClientId
from celora.core.messages import Order, Reply
from celora.errors import FederationError, WireError
from celora.wire import pack, record, unpack

NodeId = int
DEADLINE = 3600.0
"""Seconds a round waits where `plan.deadline` says nothing: no reply is waited for without end."""


@record
class Call:
    """Server to node.

    Attributes:
        job: one algorithm with one seed in one federation; the node keeps private state by it.
        kind: "begin", "order" or "export".
        body: `Begin`, `Order`, or the name of the model to export in UTF-8.
    """

    job: str
    kind: str
    body: bytes


@record
class Begin:
    """What a node needs to know of a job.

    Attributes:
        config: the resolved experiment as TOML; data, folders and downloads in it are the node's to decide.
        label: what is run, an algorithm's name or the label of an override.
        backbone: SHA-256 of the server's backbone; the node's must be equal.
        classes: the labels of all clients, sorted; empty as long as the clients are still being asked for theirs.
        clients: all clients of the job; empty as long as they are being asked.
    """

    config: str
    label: str
    backbone: str
    classes: tuple[str, ...]
    clients: tuple[str, ...]


@record
class Facts:
    """What a node tells of its client before training.

    Attributes:
        rows: split -> number of rows; no training rows: the client cannot take part.
        labels: those that occur in its rows; none where the experiment lists them (`data.classes`).
        majority: test score of always answering the most frequent training label.
        data: SHA-256 over its rows.
        backbone: SHA-256 of its backbone.
        version: of celora.
    """

    rows: Mapping[str, int]
    labels: tuple[str, ...]
    majority: float | None
    data: str
    backbone: str
    version: str


@record
class Answer:
    """Node to server.

    Attributes:
        client: who speaks.
        body: `Facts` or `Reply`, packed; empty where `error` says why there is none.
        error: what went wrong at the node, or what its policy refused to send.
        socket: bytes that the node's sockets have sent and received since its process began, where they can be counted.
    """

    client: str
    body: bytes
    error: str | None
    socket: tuple[int, ...]
