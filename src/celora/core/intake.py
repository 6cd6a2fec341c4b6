"""What comes back in a round: each reply is read, undone by the channel, screened and counted, one at a time."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.channel import Channel, decode, wire
from celora.core.learner import Metrics
from celora.core.messages import Instruction, Plan, Reply, Traffic
from celora.core.metrics import Metric
from celora.core.screen import odd_score, screen
from celora.errors import QuorumError, WireError
from celora.marks import DataSummary, marked_values
from celora.tensors import Tensors, is_head
from celora.wire import Schema, contents, pack, unpack


class Intake:
    """A round's replies (`celora.core.aggregation.Sent`), screened and counted as they are first read, one by one.

    The first pass over them ends in a `QuorumError` where too few pass the screen: so nothing is made of them.

    Args:
        initial: every weight at round 0.
        channel: the stages that what the clients send has gone through.
        index: of the round.
        downlink: what was sent to each client.

    Attributes:
        heard: whose replies have passed so far.
        excluded, scores, traffic: as in `Round`, of the replies read so far.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        initial: Tensors,
        channel: Channel,
        plan: Plan,
        headline: Metric,
        index: int,
        instructions: Mapping[ClientId, Instruction],
        replies: Mapping[ClientId, Reply],
        downlink: Mapping[ClientId, Traffic],
    ) -> None:
        self._algorithm, self._initial, self._channel = algorithm, initial, channel
        self._plan, self._headline, self._index = plan, headline, index
        self._instructions, self._replies = instructions, replies
        self._schema = Schema.of(initial)
        self._wire = wire(channel, self._schema)
        self.heard: list[ClientId] = []
        self.excluded: dict[ClientId, str] = {}
        self.scores: dict[ClientId, Mapping[str, Metrics]] = {}
        self.traffic = dict(downlink)
        self._screened = self._screen()

    def __iter__(self) -> Iterator[ClientId]:
        for _, up in self._screened:
            del up
        return iter(self.heard)

    def items(self) -> Iterator[tuple[ClientId, object]]:
        """What passes the screen; what has been read before is unpacked again."""
        for at in itertools.count():
            if at < len(self.heard):
                client = self.heard[at]
                yield client, self._decoded(client, self._sent(client))
            elif (fresh := next(self._screened, None)) is not None:
                yield fresh
                del fresh  # before the next one is unpacked
            else:
                return

    def _screen(self) -> Iterator[tuple[ClientId, object]]:
        for client in sorted(self._instructions):
            reply = self._replies.get(client)
            sent, up, problem = self._read(client, reply)
            if reply is not None:
                self.traffic[client] = _uplink(self.traffic[client], reply, sent)
                if reply.scores and not odd_score(reply.scores, self._headline):
                    self.scores[client] = reply.scores
            del sent
            if problem is not None:
                self.excluded[client] = problem
            elif self._instructions[client].action == "train":
                self.heard.append(client)
                yield client, up
            del up  # before the next one is unpacked
        if self._index <= self._plan.rounds and len(self.heard) < self._plan.quorum:
            reasons = "; ".join(f"{client}: {why}" for client, why in self.excluded.items())
            raise QuorumError(
                f"round {self._index}: {len(self.heard)} usable replies, the quorum is {self._plan.quorum} "
                f"({reasons}). Nothing of this round was kept; mend the clients and resume the run."
            )

    def _read(self, client: ClientId, reply: Reply | None) -> tuple[object, object, str | None]:
        """What a client sent, as it travelled and as it was before the channel; and why it cannot be aggregated."""
        if reply is None:
            return None, None, "no reply" + (f" within {self._plan.deadline:g} s" if self._plan.deadline else "")
        problem = reply.error or odd_score(reply.scores, self._headline)
        if problem is not None or self._instructions[client].action != "train":
            return None, None, problem
        sent: object = None
        try:
            sent = self._sent(client)
            up = self._decoded(client, sent)
        except WireError as error:
            return sent, None, str(error)
        info = self._algorithm.info
        shares = self._algorithm.shares
        return sent, up, screen(up, self._schema, shares, mixed_ranks=info.mixed_ranks, partial=info.partial)

    def _sent(self, client: ClientId) -> object:
        """A client's uplink record, as it travelled."""
        sent: object = unpack(self._algorithm.info.up, self._replies[client].frame, self._wire)
        return sent

    def _decoded(self, client: ClientId, sent: object) -> object:
        """The same before the channel."""
        if not any(stage.packs for stage in self._channel):
            return sent
        down: object = unpack(self._algorithm.info.down, self._instructions[client].frame, self._schema)
        return decode(self._channel, sent, down, self._initial)


def downlink(frame: bytes, down: object) -> Traffic:
    """What is sent to a client."""
    size = _payload(down)
    return Traffic(down_payload=size["adapter"], down_frame=len(frame), head_down=size["head"])


def _uplink(traffic: Traffic, reply: Reply, sent: object) -> Traffic:
    """With what came back; of a frame that could not be read its length is known, and not what is in it."""
    size = _payload(sent)
    return replace(
        traffic,
        up_payload=size["adapter"],
        up_frame=len(reply.frame),
        head_up=size["head"],
        summary=size["summary"],
        report=len(pack(Reply(b"", reply.scores, reply.error))),
    )


def _payload(value: object) -> dict[str, int]:
    """Tensor bytes in a record by what they are of: what is marked as a data summary, the head, the adapter."""
    total = {"adapter": 0, "head": 0, "summary": 0}
    summaries = [path for path, _, _ in marked_values(value, DataSummary)]
    for path, size in contents(value):
        of_data = any(path[: len(summary)] == summary for summary in summaries)
        total["summary" if of_data else "head" if any(map(is_head, path)) else "adapter"] += size
    return total
