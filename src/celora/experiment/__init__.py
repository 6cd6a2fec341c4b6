"""Experiment -> wiring: the only place where data, backbone, algorithm, engine and run folder meet.

    for event in run(read(Path("demo.toml"))):
        ...

`run`, `compare` and `resume` are iterators of the events they write to the journal; the caller owns the loop, shows
what it likes, and may stop at any moment: what is on disk can be resumed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celora.core.algorithm import ClientId
from celora.core.federation import run as federate
from celora.core.messages import Model, opened
from celora.engines.embedded import Embedded
from celora.errors import ConfigError, QuorumError, RunFolderError
from celora.experiment import budget
from celora.experiment.config import Experiment, dump, read, resolve, written
from celora.experiment.summary import round_event, summarise
from celora.experiment.world import Workshop, manifest
from celora.track import report
from celora.track.folder import Event, RunFolder, stamped
from celora.track.shelves import Shelves
from celora.wire import Schema

__all__ = ["Experiment", "compare", "read", "resolve", "resume", "run"]

SESSION = "session.json"


@dataclass(frozen=True)
class Job:
    """One algorithm with one seed, in a folder of its own."""

    label: str
    seed: int
    folder: Path


def run(experiment: Experiment, folder: Path | None = None, *, twin: bool = True) -> Iterator[Event]:
    """The experiment's algorithm, after its local-only twin of equal budget (in the sub-folder `local`).

    Args:
        folder: of the run; `runs/<name>` if not given.
        twin: False leaves the twin out, and with it every lift; for sweeps that have run it once.

    Raises:
        CeloraError: any of celora.errors; the folder is then as it was, or can be resumed.
    """
    root = folder or Path("runs") / experiment.name
    jobs = [Job(experiment.label, experiment.plan.seed, root)]
    if twin and experiment.label != "local":
        jobs.insert(0, Job("local", experiment.plan.seed, root / "local"))
    yield from _start(experiment, root, "run", jobs)


def compare(
    experiment: Experiment,
    labels: Sequence[str],
    seeds: Sequence[int],
    folder: Path | None = None,
    *,
    match: str = "rank",
) -> Iterator[Event]:
    """Several algorithms, each with every seed, on the same clients; local-only is always among them.

    Writes `compare.json`, a list of summaries. Labels are algorithm names or labels of `[overrides]`.

    Args:
        match: "rank": all have the rank that is written; "floats": each has the rank at which it sends as much as FedIT
            would at that one (celora.experiment.budget).

    Raises:
        CeloraError: any of celora.errors; the folder is then as it was, or can be resumed.
    """
    chosen, root = budget.match_of(match), folder or Path("runs") / experiment.name
    labels = list(dict.fromkeys(["local", *labels]))
    many = len(seeds) > 1
    jobs = [Job(a, s, root / a / f"seed-{s}" if many else root / a) for s in dict.fromkeys(seeds) for a in labels]
    yield from _start(experiment, root, "compare", jobs, chosen)


def resume(root: Path) -> Iterator[Event]:
    """Continue a run or a comparison where its last whole round ended; jobs that are done are not repeated.

    Raises:
        RunFolderError: if there is nothing to resume here.
    """
    folder = RunFolder(root)
    session = folder.read_json(SESSION)
    if session is None:
        inner = f" ({root.parent} can be resumed)" if (root.parent / SESSION).exists() else ""
        raise RunFolderError(f"{root} is not a run folder: found no {SESSION}{inner}; expected runs/<name>")
    experiment = dataclasses.replace(read(root / "experiment.toml"), base=Path(session["base"]))
    jobs = [Job(job["label"], job["seed"], root / job["folder"]) for job in session["jobs"]]
    with folder.lock():
        yield from _session(experiment, root, session["kind"], jobs, Workshop(), session.get("match", "rank"))


def _start(
    experiment: Experiment, root: Path, kind: str, jobs: list[Job], match: budget.Match = "rank"
) -> Iterator[Event]:
    labels, problems = list(dict.fromkeys(job.label for job in jobs)), list[str]()
    for label in labels:  # all mistakes of all algorithms, before anything is run
        try:
            experiment.variant(label, experiment.plan.seed)
        except ConfigError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise ConfigError(problems)
    workshop = Workshop()
    for seed in dict.fromkeys(job.seed for job in jobs):  # all that can be known to fail, before a folder is made
        for label in labels:
            variant = experiment.variant(label, seed)
            world = workshop.world(variant)
            try:
                variant.algorithm.client_init(world.learner(world.clients[0], 1))
            except ValueError as error:
                raise ConfigError([f"{label}: {error}"]) from error
    if match == "floats":  # from here on the ranks are part of what was written, so that resuming knows them
        experiment = budget.matched(experiment, labels, workshop.modules)
    folder = RunFolder.create(root)
    with folder.lock():
        folder.write("experiment.toml", written(experiment))
        places = [{"label": j.label, "seed": j.seed, "folder": str(j.folder.relative_to(root))} for j in jobs]
        base = str(experiment.base.resolve())
        folder.write_json(SESSION, {"kind": kind, "base": base, "match": match, "jobs": places})
        yield from _session(experiment, root, kind, jobs, workshop, match)


def _session(
    experiment: Experiment, root: Path, kind: str, jobs: list[Job], workshop: Workshop, match: budget.Match
) -> Iterator[Event]:
    states = [
        {
            "algorithm": j.label,
            "seed": j.seed,
            "folder": str(j.folder),
            "done": (j.folder / "summary.json").exists(),
        }
        for j in jobs
    ]
    rounds = experiment.plan.rounds
    yield stamped({"event": "session", "folder": str(root), "kind": kind, "jobs": states, "rounds": rounds})
    summaries: list[dict[str, Any]] = []
    twins: dict[int, Job] = {job.seed: job for job in jobs if job.label == "local"}
    for job in jobs:
        variant = experiment.variant(job.label, job.seed)
        twin = twins.get(job.seed)
        try:
            alone = RunFolder(twin.folder) if twin and twin != job else None
            yield from _job(variant, job, workshop, alone, match)
        except (KeyboardInterrupt, GeneratorExit, QuorumError) as reason:
            why = str(reason) or type(reason).__name__
            RunFolder(job.folder).event({"event": "stopped", "algorithm": job.label, "seed": job.seed, "why": why})
            raise
        summaries.append(RunFolder(job.folder).read_json("summary.json"))
    compared = None
    if kind == "compare":
        RunFolder(root).write_json("compare.json", summaries)
        compared = str(root / "compare.json")
    yield stamped({"event": "session_end", "folder": str(root), "summaries": summaries, "compare": compared})


def _job(
    experiment: Experiment, job: Job, workshop: Workshop, twin: RunFolder | None, match: budget.Match
) -> Iterator[Event]:
    """One algorithm, one seed: every event of it, from wherever its folder stands to its summary."""
    folder = RunFolder(job.folder)
    who = {"algorithm": job.label, "seed": job.seed}
    if (summary := folder.read_json("summary.json")) is not None:
        yield stamped({"event": "end", **who, "folder": str(job.folder), "summary": summary})
        return
    found = folder.latest()
    world = workshop.world(experiment)
    algorithm, plan = experiment.algorithm, experiment.plan
    folder.write("config.toml", dump(experiment))
    folder.write_json("manifest.json", manifest(experiment, world))
    folder.rewind(found[2] if found else None)
    checkpoint = found[0] if found else None
    start = {"from_round": checkpoint.round if checkpoint else 0, "clients": len(world.clients)}
    yield folder.event({"event": "start", **who, "folder": str(job.folder), "rounds": plan.rounds, **start})
    told = {e["text"] for e in folder.events() if e["event"] == "notice"}

    def notices(texts: Sequence[str]) -> Iterator[Event]:
        for text in texts:
            if text not in told:
                told.add(text)
                yield folder.event({"event": "notice", **who, "text": text})

    sending = budget.uplink(experiment, match, workshop.modules)
    yield from notices([*budget.notices(experiment, sending), *world.notices, *(found[3] if found else [])])
    schema = Schema.of(world.initial)
    shelves = Shelves(folder.shelves, schema, experiment.engine.state_mb * 2**20, found[1] if found else None)
    engine = Embedded(algorithm, world.learner, shelves, schema, *experiment.engine.solver(world.models.device))
    twin_rounds = {e["index"]: e["validation"] for e in twin.events() if e["event"] == "round"} if twin else {}
    sent = sum(t["up_frame"] for e in folder.events() if e["event"] == "round" for t in e["traffic"].values())
    best = checkpoint.best if checkpoint else None
    for done in federate(algorithm, engine, plan, world.clients, world.initial, checkpoint):
        sent += sum(traffic.up_frame for traffic in done.traffic.values())
        event = {
            **round_event(done, twin_rounds.get(done.index)),
            "clients": sorted(shelves),
            "up_bytes": sent,
        }
        event |= {**who, "rounds": plan.rounds}
        folder.mixing(done.server, done.index)
        folder.save(done.checkpoint, shelves, event)
        best = done.checkpoint.best
        del done  # the server's state and its frame, before the next round makes others
        line = folder.event(event)
        yield from notices([*_notes(engine.notes), *world.models.notices])
        yield line
    if best is None:
        raise RunFolderError(f"{job.folder}: no round was run")
    alone = {c: row["score"] for c, row in twin.read_json("summary.json")["clients"].items()} if twin else None
    summary = summarise(experiment, world, engine, best, folder.events(), alone)
    summary |= {"uplink": sending, "folder": str(job.folder), "adapters": str(job.folder / "adapters")}
    chosen = f"{summary['moment']}@{summary['round']}"
    for client in world.clients:
        if (kept := shelves.get(client, {}).get(chosen)) is not None:
            world.export(job.folder / "adapters" / folder_name(client), client, opened(Model, kept, schema).weights)
    events = folder.events()
    report.write(job.folder, summary, events, folder.similarity())
    line = folder.event({"event": "end", **who, "folder": str(job.folder), "summary": summary})
    folder.write_json("summary.json", summary)  # last: a job with a summary is done
    yield line


def _notes(told: Mapping[ClientId, Sequence[str]]) -> list[str]:
    """What the clients were told at their sites; this process plays all of them."""
    return [f"{client}: {note}" for client, notes in sorted(told.items()) for note in notes]


def folder_name(client: ClientId) -> str:
    """A client's folder: its name, but for what would lead elsewhere."""
    return client.replace("/", "-").replace("\\", "-") if client.strip(".") else f"client {client}"
