"""What a round and a run come to: the events of the journal and `summary.json` (docs/run-folder.md)."""

import dataclasses
import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.core.algorithm import ClientId
from celora.core.client_state import MOMENTS, Moment, StateKey
from celora.core.learner import Metrics
from celora.core.messages import Best, Exchange, Round
from celora.core.metrics import Metric
from celora.core.rounds import score_on_test
from celora.errors import DataError
from celora.experiment.config import Experiment
from celora.experiment.population import FederationInfo
from celora.track import scores
from celora.track.folder import Event

SOCKETS = ("up_socket", "down_socket")


def round_event(
    done: Round, headline: Metric, twin: Mapping[str, Any] | None, sockets: Mapping[ClientId, tuple[int, int]]
) -> Event:
    """A round for the journal.

    Args:
        headline: what the scores are of.
        twin: `validation` of the same round of the local-only twin.
        sockets: client -> bytes its sockets sent and received, where there are sockets and they count.
    """

    def over(moment: Moment) -> dict[ClientId, float]:
        return {c: m[moment]["score"] for c, m in done.scores.items() if "score" in m.get(moment, {})}

    validation = {
        moment: {"mean": _mean(s), "worst": headline.worst(s.values())} if (s := over(moment)) else None
        for moment in MOMENTS
    }
    lift = None
    if twin and validation["personal"] and twin["personal"]:
        lift = headline.gain(validation["personal"]["mean"], twin["personal"]["mean"])
    return {
        "event": "round",
        "index": done.index,
        "seconds": round(done.seconds, 3),
        "heard": list(done.heard),
        "excluded": dict(done.excluded),
        "validation": validation,
        "lift": lift,
        "best": {moment: dataclasses.asdict(best) for moment, best in done.checkpoint.best.items()},
        "scores": {client: {moment: _plain(m) for moment, m in s.items()} for client, s in done.scores.items()},
        "traffic": {
            client: dataclasses.asdict(traffic) | dict(zip(SOCKETS, sockets.get(client, (None, None)), strict=True))
            for client, traffic in done.traffic.items()
        },
    }


def build_summary(
    experiment: Experiment,
    info: FederationInfo,
    exchange: Exchange,
    best: Mapping[str, Best],
    events: Sequence[Event],
    twin: Mapping[ClientId, float | None] | None,
) -> dict[str, Any]:
    """Score the chosen and the last models on test, once, and put everything that matters in one place.

    Args:
        best: of each moment, the round chosen on validation.
        events: the journal.
        twin: client -> local-only test score; None where this is the local-only run itself.

    Raises:
        DataError: if no client has validation rows, so that nothing could be chosen.
    """
    rounds = experiment.plan.rounds
    if not best:
        raise DataError("no client has validation rows: no round can be chosen; raise data.validation")
    metric = info.task.headline
    ready = [m for m in MOMENTS if m in best]
    moment = max(ready, key=lambda name: (best[name].clients, metric.goodness(best[name].score)))
    chosen = {m: StateKey(m, best[m].round).name for m in ready}
    last = {m: StateKey(m, rounds).name for m in MOMENTS}
    wanted = sorted({*chosen.values(), *last.values()})
    tested = score_on_test(exchange, experiment.plan, info.clients, wanted, metric)

    def at(name: str) -> dict[ClientId, float]:
        return {c: m[name]["score"] for c, m in tested.items() if "score" in m.get(name, {})}

    test_rows = {client: info.rows[client]["test"] for client in info.clients}

    headline = chosen[moment]
    at_headline = {client: models[headline] for client, models in tested.items() if headline in models}
    alone = at(headline) if twin is None else twin

    def metrics(name: str) -> dict[str, float | None]:
        return scores.metrics(at(name), test_rows, {c: s for c, s in alone.items() if s is not None}, metric)

    done = [e for e in events if e["event"] == "round"]
    per_moment = {m: at(name) for m, name in chosen.items()}
    clients = {
        client: {
            "train": info.rows[client]["train"],
            "test": test_rows[client],
            "score": (score := at(headline).get(client)),
            "local_only": (by_itself := alone.get(client)),
            "lift": None if score is None or by_itself is None else metric.gain(score, by_itself),
            **{m: per_moment.get(m, {}).get(client) for m in MOMENTS},
            "majority": info.baseline[client],
            "test_metrics": {m.name: _measured(at_headline.get(client, {}), m) for m in info.task.metrics},
            **{name: _sum(done, client, name) for name in ("up_frame", *SOCKETS)},
        }
        for client in info.clients
    }
    return {
        "schema": 1,
        "algorithm": experiment.label,
        "seed": experiment.plan.seed,
        "rounds": rounds,
        "moment": moment,
        "round": best[moment].round,
        "headline": {"metric": metric.name, "higher_is_better": metric.higher_is_better},
        "metrics": metrics(headline),
        "test_metrics": _means(at_headline.values(), info.task.metrics),
        "moments": {
            m: {"round": best[m].round, "validation": best[m].score, "metrics": metrics(name)}
            for m, name in chosen.items()
        },
        "last": {m: {"metrics": metrics(name)} for m, name in last.items()},
        "clients": clients,
        "excluded": dict(info.excluded),
        "excluded_replies": {str(e["index"]): e["excluded"] for e in done if e["excluded"]},
        "notices": [e["text"] for e in events if e["event"] == "notice"],
        "bytes": _bytes(done),
        "seconds": round(sum(e["seconds"] for e in done), 3),
        "peak_rss_mb": round(peak_mb(), 1),
        "settings": experiment.settings(),
    }


def _sum(events: Sequence[Event], client: ClientId, name: str) -> int | None:
    """Bytes of a client over all rounds; None where they were never counted."""
    counts = [e["traffic"][client].get(name) for e in events if client in e["traffic"]]
    found = [count for count in counts if count is not None]
    return sum(found) if found or name not in SOCKETS else None


def _plain(metrics: Metrics) -> dict[str, float | None]:
    """For JSON, which knows no NaN: the loss of a model that diverged is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _measured(metrics: Metrics, metric: Metric) -> float | None:
    """A metric as a client reports it; None where that is no value of it."""
    value = metrics.get(metric.name, math.nan)
    return value if metric.admits(value) else None


def _means(found: Iterable[Metrics], metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    """The mean over clients of each metric, and its direction."""
    reported = list(found)
    values = {metric: [v for m in reported if (v := _measured(m, metric)) is not None] for metric in metrics}
    return {
        metric.name: {"mean": sum(of) / len(of) if of else None, "higher_is_better": metric.higher_is_better}
        for metric, of in values.items()
    }


def _bytes(events: Sequence[Event]) -> dict[str, Any]:
    """Totals, and means per client and round of training (`summary`: per client that sent one)."""
    rows = [traffic for event in events for traffic in event["traffic"].values()]
    counted = [name for name in SOCKETS if any(row.get(name) is not None for row in rows)]
    named = [name for name in (rows[0] if rows else ()) if name not in SOCKETS]
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in named}
    total |= {name: sum(row.get(name) or 0 for row in rows) if name in counted else None for name in SOCKETS}
    total["head"] = total.pop("head_up", 0)
    turns = max(1, sum(1 for row in rows if row["up_frame"]))
    senders = max(1, sum(1 for row in rows if row["summary"]))
    names = ("up_payload", "up_frame", "down_payload", "down_frame", "head", "head_down", "report")
    each: dict[str, Any] = {name: _whole(total.get(name, 0) / turns) for name in names}
    each |= {name: _whole(total[name] / turns) if name in counted else None for name in SOCKETS}
    return {**each, "summary": _whole(total.get("summary", 0) / senders), "total": total}


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else round(number, 2)


def _mean(by_client: Mapping[ClientId, float]) -> float:
    return sum(by_client.values()) / len(by_client)


def peak_mb() -> float:
    """Most memory this process has held; on Linux not `ru_maxrss`, which begins with what its parent held."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
