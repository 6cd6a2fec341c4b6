"""One algorithm with one seed: its rounds, its journal and checkpoints, and what they come to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celora.core.algorithm import ClientId
from celora.core.client_state import StateKey
from celora.core.rounds import run_rounds
from celora.errors import RunFolderError
from celora.experiment import budget
from celora.experiment.config import Experiment, dump
from celora.experiment.population import ResourceCache, manifest
from celora.experiment.runtimes import Runtime
from celora.experiment.summary import build_summary, round_event
from celora.track import report
from celora.track.folder import Event, RunFolder

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Job:
    """One algorithm with one seed, in a folder of its own."""

    label: str
    seed: int
    path: Path

    @property
    def folder(self) -> RunFolder:
        """Its folder."""
        return RunFolder(self.path)

    @property
    def names(self) -> dict[str, Any]:
        """By what its events say that they are of this job."""
        return {"algorithm": self.label, "seed": self.seed}

    def summary(self) -> dict[str, Any] | None:
        """What it has come to; None as long as it is not done."""
        found: dict[str, Any] | None = self.folder.read_json(SUMMARY)
        return found

    def end(self, summary: dict[str, Any]) -> Event:
        """Its last event."""
        return {"event": "end", **self.names, "folder": str(self.path), "summary": summary}


def run_job(
    job: Job,
    experiment: Experiment,
    runtime: Runtime,
    resources: ResourceCache,
    *,
    at_sites: str,
    match: budget.Match,
    local_only: Job | None,
) -> Iterator[Event]:
    """Every event of a job, from wherever its folder stands to its summary.

    Args:
        at_sites: the name of the job at its sites.
        match: how its rank came about.
        local_only: the job of the same seed in which nothing is sent; None: this one is it, or there is none.

    Raises:
        CeloraError: any of celora.errors; the folder is then as it was after the last round, and can be resumed.
    """
    folder, plan = job.folder, experiment.plan
    found = folder.latest()
    checkpoint, stores, last, damage = found or (None, {}, None, [])
    pool = runtime.pool(experiment, folder, at_sites, stores)
    info = pool.info
    folder.write("config.toml", dump(experiment))
    folder.write_json("manifest.json", manifest(experiment, info))
    folder.rewind(last)
    start = {"from_round": checkpoint.round if checkpoint else 0, "clients": len(info.clients)}
    yield folder.event({"event": "start", **job.names, "folder": str(job.path), "rounds": plan.rounds, **start})
    noticed = {event["text"] for event in folder.events() if event["event"] == "notice"}

    def notices(texts: Sequence[str]) -> Iterator[Event]:
        for text in texts:
            if text not in noticed:
                noticed.add(text)
                yield folder.event({"event": "notice", **job.names, "text": text})

    uplink = budget.uplink(experiment, match, resources.modules)
    yield from notices([*budget.notices(experiment, uplink), *info.notices, *damage])
    twin_rounds = _validation(local_only) if local_only else {}
    sent = sum(t["up_frame"] for e in folder.events() if e["event"] == "round" for t in e["traffic"].values())
    best = checkpoint.best if checkpoint else None
    for done in run_rounds(
        experiment.algorithm, pool.exchange, plan, info.clients, info.initial, checkpoint,
        headline=info.task.headline, channel=experiment.filters,
    ):  # fmt: skip
        sent += sum(traffic.up_frame for traffic in done.traffic.values())
        event = {
            **round_event(done, info.task.headline, twin_rounds.get(done.index), pool.sockets()),
            "clients": sorted(pool.stores),
            "up_bytes": sent,
            **job.names,
            "rounds": plan.rounds,
        }
        folder.mixing(done.server, done.index)
        folder.save(done.checkpoint, pool.stores, event)
        best = done.checkpoint.best
        del done  # the server's state and its frame, before the next round makes others
        line = folder.event(event)
        yield from notices(pool.notices())
        yield line
    if best is None:
        raise RunFolderError(f"{job.path}: no round was run")
    twin_scores = _scores(local_only) if local_only else None
    summary = build_summary(experiment, info, pool.exchange, best, folder.events(), twin_scores)
    summary |= {"uplink": uplink, "folder": str(job.path), "adapters": pool.adapters}
    yield from notices(pool.export(StateKey(summary["moment"], summary["round"]).name))
    report.write(job.path, summary, folder.events(), folder.similarity())
    line = folder.event(job.end(summary))
    folder.write_json(SUMMARY, summary)  # last: a job with a summary is done
    yield line


def _validation(job: Job) -> dict[int, Any]:
    """Round -> its validation scores, of another job."""
    return {event["index"]: event["validation"] for event in job.folder.events() if event["event"] == "round"}


def _scores(job: Job) -> dict[ClientId, float | None]:
    """Client -> its test score, of another job that is done."""
    return {client: row["score"] for client, row in job.folder.read_json(SUMMARY)["clients"].items()}
