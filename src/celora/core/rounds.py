"""The loop, once: frames go out, frames come back, what is fit is aggregated.

    for round in run(algorithm, exchange, plan, clients, initial):
        ...

An `Exchange` is an engine: it takes one `Instruction` a client and brings back their `Reply`s; a client that is missing
from them dropped out. In process, on a network, or with a fault in between: to this file it is one function.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from celora.core.aggregation import Heard, MeanStage
from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.channel import Channel, decode, wire
from celora.core.client_state import MOMENTS, StateKey
from celora.core.learner import Metrics
from celora.core.messages import Best, Checkpoint, Exchange, Instruction, Plan, Reply, Round, Task, Traffic
from celora.core.metrics import ACCURACY, Metric
from celora.core.screen import odd_score, screen
from celora.errors import QuorumError, WireError
from celora.marks import DataSummary, marked_values
from celora.rng import generator
from celora.tensors import Tensors, is_head
from celora.wire import Schema, contents, pack, unpack

Read = Callable[[Instruction, Reply], tuple[object, object]]
"""Instruction and reply -> the uplink record, as it travelled and as it was before the channel."""


def run_rounds(
    algorithm: AnyAlgorithm,
    exchange: Exchange,
    plan: Plan,
    clients: Sequence[ClientId],
    initial: Tensors,
    checkpoint: Checkpoint | None = None,
    headline: Metric = ACCURACY,
    channel: Channel = (),
    mean_stage: MeanStage | None = None,
) -> Iterator[Round]:
    """Train, round by round, from the start or from a checkpoint; the caller owns the loop.

    Args:
        initial: every weight at round 0, as the clients' `Learner.initial` (private bases excepted).
        headline: what the clients' scores are of; the best round is chosen by it.
        channel: the stages that what the clients send has gone through.
        mean_stage: what every mean over clients passes before the algorithm uses it.

    Raises:
        ValueError: before round 1, if there is a `mean_stage` and the algorithm's server reads each reply.
        QuorumError: when a round brings fewer usable replies than `plan.quorum`. The state is that of the round
            before; running again from its checkpoint repeats the round.
    """
    if mean_stage is not None and algorithm.info.aggregation != "mean":
        raise ValueError(
            f"found a stage for the means of {type(algorithm).__name__}, whose server reads each reply, which no stage "
            'covers; leave the stage out, or take an algorithm whose info says aggregation = "mean"'
        )
    schema = Schema.of(initial)
    wired, packs = wire(channel, schema), any(stage.packs for stage in channel)

    def read(instruction: Instruction, reply: Reply) -> tuple[object, object]:
        """A client's uplink record, as it travelled and as it was before the channel."""
        sent: object = unpack(algorithm.info.up, reply.frame, wired)
        if not packs:
            return sent, sent
        return sent, decode(channel, sent, unpack(algorithm.info.down, instruction.frame, schema), initial)

    if checkpoint is None:
        server, best, done = algorithm.server_init(initial, clients), dict[str, Best](), 0
    else:
        server = unpack(algorithm.info.server, checkpoint.server, schema)
        best, done = dict(checkpoint.best), checkpoint.round
    for index in range(done + 1, plan.rounds + 2):
        began = time.monotonic()
        closing = index > plan.rounds
        evaluate = closing or index % plan.evaluate_every == 0 or index == plan.rounds
        drawn = [] if closing else _draw(plan, clients, index)
        kept = [StateKey(moment, best[moment].round) for moment in MOMENTS if moment in best]
        keep = tuple(key.name for key in [*kept, *([StateKey("personal", plan.rounds)] if closing else [])])
        instructions: dict[ClientId, Instruction] = {}
        traffic: dict[ClientId, Traffic] = {}
        frames: dict[bytes, bytes] = {}
        for client in clients if evaluate else drawn:
            task: Task = "close" if closing else "train" if client in drawn else "evaluate"
            down = algorithm.send(server, client)
            frame = pack(down, schema)
            frame = frames.setdefault(frame, frame)  # what is sent to all is in memory once
            instructions[client] = Instruction(index, task, frame, evaluate, keep, plan.deadline)
            traffic[client] = _downlink(frame, down)
        replies = exchange(instructions)
        intake = _Intake(algorithm, schema, read, plan, headline, index, instructions, replies, traffic)
        if not closing:
            server = algorithm.aggregate(server, Heard(intake, algorithm.info.aggregation, mean_stage))
        heard = tuple(intake)  # what `aggregate` has not read is screened now
        best = improved(best, index, intake.scores, headline)
        yield Round(
            index=index,
            heard=heard,
            excluded=intake.excluded,
            scores=intake.scores,
            traffic=intake.traffic,
            seconds=time.monotonic() - began,
            server=server,
            checkpoint=Checkpoint(index, pack(server, schema), best),
        )


def _draw(plan: Plan, clients: Sequence[ClientId], index: int) -> list[ClientId]:
    """The clients that train in a round: all, or a uniform draw without replacement."""
    count = max(1, round(plan.fraction * len(clients)))
    order = torch.randperm(len(clients), generator=generator(plan.seed, "sample", index)).tolist()
    return sorted(clients[position] for position in order[:count])


class _Intake:
    """A round's replies (`celora.core.aggregation.Uplinks`), screened and written down as they are first read.

    The first pass over them ends in a `QuorumError` where too few pass the screen: so nothing is made of them.

    Attributes:
        heard: whose replies have passed so far.
        excluded, scores, traffic: as in `Round`, of the replies read so far.
    """

    def __init__(
        self,
        algorithm: AnyAlgorithm,
        schema: Schema,
        read: Read,
        plan: Plan,
        headline: Metric,
        index: int,
        instructions: Mapping[ClientId, Instruction],
        replies: Mapping[ClientId, Reply],
        downlink: Mapping[ClientId, Traffic],
    ) -> None:
        self._algorithm, self._schema, self._read = algorithm, schema, read
        self._plan, self._headline, self._index = plan, headline, index
        self._instructions, self._replies = instructions, replies
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
                yield client, self._read(self._instructions[client], self._replies[client])[1]
            elif (fresh := next(self._screened, None)) is not None:
                yield fresh
                del fresh  # before the next one is unpacked
            else:
                return

    def _screen(self) -> Iterator[tuple[ClientId, object]]:
        for client in sorted(self._instructions):
            reply, task = self._replies.get(client), self._instructions[client].task
            sent, up, problem = self._hear(client, reply)
            if reply is not None:
                self.traffic[client] = _uplink(self.traffic[client], reply, sent)
                if reply.scores and not odd_score(reply.scores, self._headline):
                    self.scores[client] = reply.scores
            del sent
            if problem is not None:
                self.excluded[client] = problem
            elif task == "train":
                self.heard.append(client)
                yield client, up
            del up  # before the next one is unpacked
        if self._index <= self._plan.rounds and len(self.heard) < self._plan.quorum:
            reasons = "; ".join(f"{client}: {why}" for client, why in self.excluded.items())
            raise QuorumError(
                f"round {self._index}: {len(self.heard)} usable replies, the quorum is {self._plan.quorum} "
                f"({reasons}). Nothing of this round was kept; mend the clients and resume the run."
            )

    def _hear(self, client: ClientId, reply: Reply | None) -> tuple[object, object, str | None]:
        """What a client sent, as it travelled and as it was before the channel, and why it cannot be aggregated."""
        if reply is None:
            deadline = self._plan.deadline
            return None, None, "no reply" + (f" within {deadline:g} s" if deadline else "")
        problem = reply.error or odd_score(reply.scores, self._headline)
        if problem is not None or self._instructions[client].task != "train":
            return None, None, problem
        try:
            sent, up = self._read(self._instructions[client], reply)
        except WireError as error:
            return None, None, str(error)
        info, shares = self._algorithm.info, self._algorithm.shares
        return sent, up, screen(up, self._schema, shares, mixed_ranks=info.mixed_ranks, partial=info.partial)


def improved(
    best: Mapping[str, Best],
    index: int,
    scores: Mapping[ClientId, Mapping[str, Metrics]],
    headline: Metric = ACCURACY,
) -> dict[str, Best]:
    """The standings after a round: per moment, the round with the best mean validation score.

    A mean over more clients goes before a mean over fewer, so that a round in which weak clients dropped out cannot
    win; among equals the earliest round stays. "received" in round `index` is the aggregate of round `index - 1`.
    """
    now = dict(best)
    for moment, of_round in (("received", index - 1), ("personal", index)):
        measured = [s[moment]["score"] for s in scores.values() if "score" in s.get(moment, {})]
        values = [score for score in measured if math.isfinite(score)]
        if not values:
            continue
        candidate = Best(of_round, sum(values) / len(values), len(values))
        held = best.get(moment)
        if held is None or _standing(candidate, headline) > _standing(held, headline):
            now[moment] = candidate
    return now


def _standing(of: Best, headline: Metric) -> tuple[int, float]:
    return of.clients, headline.goodness(of.score)


def _downlink(frame: bytes, down: object) -> Traffic:
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


def score_on_test(
    exchange: Exchange,
    plan: Plan,
    clients: Sequence[ClientId],
    names: Sequence[str],
    headline: Metric = ACCURACY,
) -> dict[ClientId, Mapping[str, Metrics]]:
    """Score kept models (`names`, such as "personal@7") on each client's test split: once, after all choices.

    Returns:
        client -> name -> metrics; a client that does not answer is missing.

    Raises:
        QuorumError: if fewer than `plan.quorum` answer; running again from the last checkpoint repeats only this.
    """
    instruction = Instruction(plan.rounds + 2, "test", b"", evaluate=False, keep=tuple(names), deadline=None)
    replies = exchange(dict.fromkeys(clients, instruction))
    found = {client: replies[client] for client in clients if client in replies}
    problems = {client: reply.error or odd_score(reply.scores, headline) for client, reply in found.items()}
    scores = {client: reply.scores for client, reply in found.items() if problems[client] is None}
    if len(scores) < min(plan.quorum, len(clients)):
        why = "; ".join(f"{client}: {problems.get(client) or 'no reply'}" for client in clients if client not in scores)
        raise QuorumError(f"{len(scores)} clients were scored on test, the quorum is {plan.quorum} ({why})")
    return scores
