"""Experiment -> wiring: the only place where data, backbone, algorithm, engine and run folder meet.

    for event in run(read(Path("demo.toml"))):
        ...

`run`, `compare` and `resume` are iterators of the events they write to the journal; the caller owns the loop, shows
what it likes, and may stop at any moment: what is on disk can be resumed.
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celora.core.rounds import run_rounds as federate
from celora.errors import ConfigError, FederationError, QuorumError, RunFolderError
from celora.experiment import budget
from celora.experiment.config import Experiment, dump, read, resolve, written
from celora.experiment.population import ResourceCache, manifest
from celora.experiment.runtimes import LocalRuntime, Runtime, simulated
from celora.experiment.server import Listen, check_server, serving
from celora.experiment.summary import build_summary, round_event
from celora.track import report
from celora.track.folder import Event, RunFolder, stamped

__all__ = ["Experiment", "Listen", "Say", "compare", "read", "resolve", "resume", "run"]

SESSION = "session.json"


@dataclass(frozen=True)
class Job:
    """One algorithm with one seed, in a folder of its own."""

    label: str
    seed: int
    folder: Path


ENGINES = ("embedded", "flower-sim")
Where = str | Listen
"""Where the clients are: an engine of this machine, or sites that connect to a `Listen`."""
Log = Callable[[str], None]


def ignore_log(text: str) -> None:
    """For whoever only wants events."""


@dataclass(frozen=True)
class Session:
    """What jobs have in common.

    Attributes:
        federation: under which sites keep their state; drawn anew for each session, and kept with it.
    """

    kind: str
    match: budget.Match = "rank"
    where: Where = "embedded"
    federation: str = field(default_factory=lambda: secrets.token_hex(6))

    def job(self, job: Job) -> str:
        """The job's name at its sites."""
        label = re.sub(r"[^A-Za-z0-9._-]", "-", job.label).lstrip("._-") or "job"
        return f"{self.federation}/{label}-seed-{job.seed}"


def run(
    experiment: Experiment,
    folder: Path | None = None,
    *,
    twin: bool = True,
    where: Where = "embedded",
    log: Log = ignore_log,
) -> Iterator[Event]:
    """The experiment's algorithm, after its local-only twin of equal budget (in the sub-folder `local`).

    Args:
        folder: of the run; `runs/<name>` if not given.
        twin: False leaves the twin out, and with it every lift; for sweeps that have run it once.
        where: the clients are: "embedded", in this process; "flower-sim", in Flower's simulation; or at sites that
            connect to a `Listen`.
        say: told what happens between two events: who has joined, who is waited for.

    Raises:
        CeloraError: any of celora.errors; the folder is then as it was, or can be resumed.
    """
    root = folder or Path("runs") / experiment.name
    jobs = [Job(experiment.label, experiment.plan.seed, root)]
    if twin and experiment.label != "local":
        jobs.insert(0, Job("local", experiment.plan.seed, root / "local"))
    if isinstance(where, str) and where not in ENGINES:
        raise ConfigError([f"--engine: found {where!r}, expected one of {', '.join(ENGINES)}"])
    yield from _start(experiment, root, jobs, Session("run", where=where), log)


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
    yield from _start(experiment, root, jobs, Session("compare", match=chosen))


def resume(root: Path, log: Log = ignore_log) -> Iterator[Event]:
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
    where = session.get("where", "embedded")
    plan = Session(
        kind=session["kind"],
        match=session.get("match", "rank"),
        federation=session.get("federation", "local"),
        where=where if isinstance(where, str) else Listen(**{**where, "clients": _frozen(where["clients"])}),
    )
    with folder.lock():
        yield from _session(experiment, root, jobs, plan, ResourceCache(), log)


def _frozen(clients: list[str] | int | None) -> tuple[str, ...] | int | None:
    """As JSON gives them, and as they were."""
    return tuple(clients) if isinstance(clients, list) else clients


def _start(
    experiment: Experiment, root: Path, jobs: list[Job], session: Session, log: Log = ignore_log
) -> Iterator[Event]:
    labels, problems = list(dict.fromkeys(job.label for job in jobs)), list[str]()
    for label in labels:  # all mistakes of all algorithms, before anything is run
        try:
            experiment.variant(label, experiment.plan.seed)
        except ConfigError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise ConfigError(problems)
    resources = ResourceCache()
    for seed in dict.fromkeys(job.seed for job in jobs):  # all that can be known to fail, before a folder is made
        for label in labels:
            try:
                _check(experiment.variant(label, seed), resources, session.where)
            except ValueError as error:
                raise ConfigError([f"{label}: {error}"]) from error
    if session.match == "floats":  # from here on the ranks are part of what was written, so that resuming knows them
        experiment = budget.matched(experiment, labels, resources.modules)
    folder = RunFolder.create(root)
    with folder.lock():
        folder.write("experiment.toml", written(experiment))
        places = [{"label": j.label, "seed": j.seed, "folder": str(j.folder.relative_to(root))} for j in jobs]
        base = str(experiment.base.resolve())
        folder.write_json(SESSION, {**dataclasses.asdict(session), "base": base, "jobs": places})
        yield from _session(experiment, root, jobs, session, resources, log)


def _check(variant: Experiment, resources: ResourceCache, where: Where) -> None:
    """Whether an algorithm can be run there, as far as it can be known now."""
    if isinstance(where, Listen):
        check_server(variant, resources, where)
    else:
        population = resources.population(variant)
        variant.algorithm.client_init(population.learner(population.clients[0], 1))


@contextmanager
def _place(
    session: Session, experiment: Experiment, resources: ResourceCache, root: Path, log: Log
) -> Iterator[Runtime]:
    where = session.where
    if isinstance(where, Listen):
        with serving(where, experiment, resources, root, session.federation, log) as sites:
            yield sites
    elif where == "flower-sim":
        with simulated(experiment, resources, root, log) as simulation:
            yield simulation
    else:
        yield LocalRuntime(resources)


def _session(
    experiment: Experiment, root: Path, jobs: list[Job], session: Session, resources: ResourceCache, log: Log
) -> Iterator[Event]:
    kind = session.kind
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
    with ExitStack() as open_places:
        place: Runtime | None = None
        for job in jobs:
            variant = experiment.variant(job.label, job.seed)
            twin = twins.get(job.seed)
            try:
                if (summary := RunFolder(job.folder).read_json("summary.json")) is not None:
                    who = {"algorithm": job.label, "seed": job.seed}
                    yield stamped({"event": "end", **who, "folder": str(job.folder), "summary": summary})
                else:
                    if place is None:
                        place = open_places.enter_context(_place(session, experiment, resources, root, log))
                    alone = RunFolder(twin.folder) if twin and twin != job else None
                    yield from _job(variant, job, place, resources, alone, session)
            except (KeyboardInterrupt, GeneratorExit, QuorumError, FederationError) as reason:
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
    experiment: Experiment, job: Job, place: Runtime, resources: ResourceCache, twin: RunFolder | None, session: Session
) -> Iterator[Event]:
    """One algorithm, one seed: every event of it, from wherever its folder stands to its summary."""
    folder = RunFolder(job.folder)
    who = {"algorithm": job.label, "seed": job.seed}
    found = folder.latest()
    team = place.team(experiment, folder, session.job(job), found[1] if found else {})
    known, algorithm, plan = team.known, experiment.algorithm, experiment.plan
    folder.write("config.toml", dump(experiment))
    folder.write_json("manifest.json", manifest(experiment, known))
    folder.rewind(found[2] if found else None)
    checkpoint = found[0] if found else None
    start = {"from_round": checkpoint.round if checkpoint else 0, "clients": len(known.clients)}
    yield folder.event({"event": "start", **who, "folder": str(job.folder), "rounds": plan.rounds, **start})
    told = {e["text"] for e in folder.events() if e["event"] == "notice"}

    def notices(texts: Sequence[str]) -> Iterator[Event]:
        for text in texts:
            if text not in told:
                told.add(text)
                yield folder.event({"event": "notice", **who, "text": text})

    sending = budget.uplink(experiment, session.match, resources.modules)
    yield from notices([*budget.notices(experiment, sending), *known.notices, *(found[3] if found else [])])
    twin_rounds = {e["index"]: e["validation"] for e in twin.events() if e["event"] == "round"} if twin else {}
    sent = sum(t["up_frame"] for e in folder.events() if e["event"] == "round" for t in e["traffic"].values())
    best = checkpoint.best if checkpoint else None
    for done in federate(algorithm, team.exchange, plan, known.clients, known.initial, checkpoint, known.task.headline):
        sent += sum(traffic.up_frame for traffic in done.traffic.values())
        event = {
            **round_event(done, known.task.headline, twin_rounds.get(done.index), team.sockets()),
            "clients": sorted(team.stores),
            "up_bytes": sent,
        }
        event |= {**who, "rounds": plan.rounds}
        folder.mixing(done.server, done.index)
        folder.save(done.checkpoint, team.stores, event)
        best = done.checkpoint.best
        del done  # the server's state and its frame, before the next round makes others
        line = folder.event(event)
        yield from notices(team.told())
        yield line
    if best is None:
        raise RunFolderError(f"{job.folder}: no round was run")
    alone = {c: row["score"] for c, row in twin.read_json("summary.json")["clients"].items()} if twin else None
    summary = build_summary(experiment, known, team.exchange, best, folder.events(), alone)
    summary |= {"uplink": sending, "folder": str(job.folder), "adapters": team.adapters}
    yield from notices(team.export(f"{summary['moment']}@{summary['round']}"))
    events = folder.events()
    report.write(job.folder, summary, events, folder.similarity())
    line = folder.event({"event": "end", **who, "folder": str(job.folder), "summary": summary})
    folder.write_json("summary.json", summary)  # last: a job with a summary is done
    yield line
