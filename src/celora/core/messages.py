"""What server and clients send each other, what the server remembers, and the plan that they follow.

What a client keeps is in `celora.core.client_state`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from celora.core.algorithm import ClientId
from celora.core.learner import Metrics
from celora.fields import Count, Positive, setting, settings
from celora.wire import record

Action = Literal["train", "evaluate", "close", "test"]


@settings
class Plan:
    """How long, with whom, and when to stop."""

    rounds: Count = setting(10, "rounds of local training")
    fraction: float = setting(1.0, "share of the clients that train in a round", gt=0, le=1)
    quorum: Count = setting(1, "usable replies a round needs; below it the run stops and can be resumed")
    deadline: Positive | None = setting(None, "seconds after which a round goes on without the missing replies")
    evaluate_every: Count = setting(1, "rounds between evaluations; the last round is always evaluated")
    seed: int = setting(0, "seed of every draw of the run", ge=0)


@record
class Instruction:
    """Server to client.

    Attributes:
        round: 1, 2, …
        action: "train"; "evaluate": the same, but nothing is kept or sent (a client that was not drawn);
            "close": only receive the last aggregate; "test": score kept models on the test split.
        frame: the downlink record, packed; empty for "test".
        evaluate: whether both moments are scored on the validation split.
        keep: names (`StateKey.name`) of the models to keep or to test, such as "personal@7"; others may be forgotten.
        deadline: seconds.
    """

    round: int
    action: str
    frame: bytes
    evaluate: bool
    keep: tuple[str, ...]
    deadline: float | None


@record
class Reply:
    """Client to server: the uplink record, packed (empty if none is due), scores, or what went wrong."""

    frame: bytes
    scores: Mapping[str, Mapping[str, float]]
    error: str | None


Exchange = Callable[[Mapping[ClientId, Instruction]], Mapping[ClientId, Reply]]


@record
class Best:
    """The evaluated round with the best mean validation score, and how many clients that mean is over."""

    round: int
    score: float
    clients: int


@record
class Checkpoint:
    """All that the server must remember after a round."""

    round: int
    server: bytes
    best: Mapping[str, Best]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round, each the length of something that was really built.

    Payload is tensor content: of the adapter, of the head, and of the data summary, three numbers that do not
    overlap. A frame is all of these and its framing. `report` is the scores that travel beside the frame.
    """

    up_payload: int = 0
    up_frame: int = 0
    down_payload: int = 0
    down_frame: int = 0
    head_up: int = 0
    head_down: int = 0
    summary: int = 0
    report: int = 0


@dataclass(frozen=True)
class Round:
    """What happened in a round.

    Attributes:
        index: 1 … rounds; rounds + 1 is the closing download, in which nobody trains.
        heard: clients whose reply was aggregated.
        excluded: client -> why its reply was not used.
        scores: client -> moment -> validation metrics. "received" is measured before this round's training, so it
            tells of the aggregate of round `index - 1`; "personal" after it; "train" holds the training loss.
    """

    index: int
    heard: tuple[ClientId, ...]
    excluded: Mapping[ClientId, str]
    scores: Mapping[ClientId, Mapping[str, Metrics]]
    traffic: Mapping[ClientId, Traffic]
    seconds: float
    server: object
    checkpoint: Checkpoint = field(repr=False)
