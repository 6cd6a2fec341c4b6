"""The loop, once: frames go out, frames come back, what is fit is aggregated.

    for round in run(algorithm, exchange, plan, clients, initial):
        ...

An `Exchange` is an engine: it takes one `Instruction` a client and brings back their `Reply`s; a client that is missing
from them dropped out. In process, on a network, or with a fault in between: to this file it is one function.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

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
) -> Iterator[Round]:
    """Train, round by round, from the start or from a checkpoint; the caller owns the loop.

    Args:
        initial: every weight at round 0, as the clients' `Learner.initial` (private bases excepted).
        headline: what the clients' scores are of; the best round is chosen by it.
        channel: the stages that what the clients send has gone through.

    Raises:
        QuorumError: when a round brings fewer usable replies than `plan.quorum`. The state is that of the round
            before; running again from its checkpoint repeats the round.
    """
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
        heard: list[ClientId] = []
        excluded: dict[ClientId, str] = {}
        scores: dict[ClientId, Mapping[str, Metrics]] = {}
        for client in sorted(instructions):  # one reply at a time: of a thousand, no two need be in memory
            reply = replies.get(client)
            sent, problem = _hear(algorithm, schema, read, instructions[client], reply, plan, headline)
            if problem is not None:
                excluded[client] = problem
            elif instructions[client].task == "train":
                heard.append(client)
            if reply is not None:
                traffic[client] = _uplink(traffic[client], reply, sent)
                if reply.scores and not odd_score(reply.scores, headline):
                    scores[client] = reply.scores
        if len(heard) < (0 if closing else plan.quorum):
            reasons = "; ".join(f"{client}: {why}" for client, why in excluded.items())
            raise QuorumError(
                f"round {index}: {len(heard)} usable replies, the quorum is {plan.quorum} ({reasons}). "
                "Nothing of this round was kept; mend the clients and resume the run."
            )
        if heard:
            server = algorithm.aggregate(server, _Heard(read, instructions, replies, heard))
        best = improved(best, index, scores, headline)
        yield Round(
            index=index,
            heard=tuple(heard),
            excluded=excluded,
            scores=scores,
            traffic=traffic,
            seconds=time.monotonic() - began,
            server=server,
            checkpoint=Checkpoint(index, pack(server, schema), best),
        )


def _draw(plan: Plan, clients: Sequence[ClientId], index: int) -> list[ClientId]:
    """The clients that train in a round: all, or a uniform draw without replacement."""
    count = max(1, round(plan.fraction * len(clients)))
    order = torch.randperm(len(clients), generator=generator(plan.seed, "sample", index)).tolist()
    return sorted(clients[position] for position in order[:count])


def _hear(
    algorithm: AnyAlgorithm,
    schema: Schema,
    read: Read,
    instruction: Instruction,
    reply: Reply | None,
    plan: Plan,
    headline: Metric,
) -> tuple[object, str | None]:
    """What a client sent, as it travelled, if it can be read, and why it cannot be aggregated."""
    if reply is None:
        return None, "no reply" + (f" within {plan.deadline:g} s" if plan.deadline else "")
    if (problem := reply.error or odd_score(reply.scores, headline)) is not None or instruction.task != "train":
        return None, problem
    try:
        sent, up = read(instruction, reply)
    except WireError as error:
        return None, str(error)
    info = algorithm.info
    return sent, screen(up, schema, algorithm.shares, mixed_ranks=info.mixed_ranks, partial=info.partial)


class _Heard(Mapping[ClientId, object]):
    """What the clients sent, unpacked when it is asked for: an average needs one of them at a time."""

    def __init__(
        self,
        read: Read,
        instructions: Mapping[ClientId, Instruction],
        replies: Mapping[ClientId, Reply],
        clients: Sequence[ClientId],
    ):
        self._read, self._instructions, self._replies = read, instructions, replies
        self._clients = dict.fromkeys(clients)

    def __getitem__(self, client: ClientId) -> object:
        if client not in self._clients:
            raise KeyError(client)
        return self._read(self._instructions[client], self._replies[client])[1]

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


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
