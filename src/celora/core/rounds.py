"""The loop, once: frames go out, frames come back, what is fit is aggregated.

    for round in run(algorithm, exchange, plan, clients, initial):
        ...

An `Exchange` is an engine: it takes one `Instruction` a client and brings back their `Reply`s; a client that is missing
from them dropped out. In process, on a network, or with a fault in between: to this file it is one function.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from celora.core.aggregation import Heard, MeanStage
from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.channel import Channel
from celora.core.client_state import MOMENTS, StateKey
from celora.core.intake import Intake, downlink
from celora.core.learner import Metrics
from celora.core.messages import Action, Best, Checkpoint, Exchange, Instruction, Plan, Round, Traffic
from celora.core.metrics import ACCURACY, Metric
from celora.core.screen import odd_score
from celora.errors import QuorumError
from celora.lazy import torch
from celora.rng import generator
from celora.tensors import Tensors
from celora.wire import Schema, pack, unpack


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
        ValueError: before round 1, if there is a stage and the algorithm reads each reply, which no stage covers.
        QuorumError: when a round brings fewer usable replies than `plan.quorum`. The state is that of the round
            before; running again from its checkpoint repeats the round.
    """
    if mean_stage is not None and algorithm.info.aggregation != "mean":
        raise ValueError(
            f"found a stage for the means of {type(algorithm).__name__}, whose server reads each reply, which no stage "
            'covers; leave the stage out, or take an algorithm whose info says aggregation = "mean"'
        )
    schema = Schema.of(initial)
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
            action: Action = "close" if closing else "train" if client in drawn else "evaluate"
            down = algorithm.send(server, client)
            frame = pack(down, schema)
            frame = frames.setdefault(frame, frame)  # what is sent to all is in memory once
            instructions[client] = Instruction(index, action, frame, evaluate, keep, plan.deadline)
            traffic[client] = downlink(frame, down)
        replies = exchange(instructions)
        intake = Intake(algorithm, initial, channel, plan, headline, index, instructions, replies, traffic)
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
