"""A session: the jobs of one experiment in one run folder, begun or resumed."""

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from celora.errors import ConfigError, FederationError, QuorumError, RunFolderError
from celora.experiment import budget
from celora.experiment.config import Experiment, read, written
from celora.experiment.embedded import EmbeddedEngine
from celora.experiment.engines import ENGINES, name_of
from celora.experiment.job import Job, run_job
from celora.experiment.population import ResourceCache
from celora.experiment.runtimes import Engine, Log, Runtime, SessionContext
from celora.track.folder import Event, RunFolder, stamped

FILE = "session.json"
SCHEMA = 1
"""Layout of a run folder: of its session.json, and of the checkpoints that resuming needs."""
Kind = Literal["run", "compare"]


@dataclass(frozen=True)
class Session:
    """What the jobs of a run folder have in common; session.json keeps it.

    Attributes:
        federation: the name under which sites keep their state; drawn anew for each session, and kept with it.
    """

    kind: Kind
    jobs: Sequence[Job]
    match: budget.Match = "rank"
    engine: Engine = field(default_factory=EmbeddedEngine)
    federation: str = field(default_factory=lambda: secrets.token_hex(6))

    def at_sites(self, job: Job) -> str:
        """The name of a job at its sites."""
        label = re.sub(r"[^A-Za-z0-9._-]", "-", job.label).lstrip("._-") or "job"
        return f"{self.federation}/{label}-seed-{job.seed}"

    def saved(self, folder: Path, base: Path) -> dict[str, Any]:
        """As session.json keeps it.

        Args:
            base: the folder that paths in the experiment are relative to.
        """
        return {
            "schema": SCHEMA,
            "celora": version("celora"),
            "kind": self.kind,
            "match": self.match,
            "engine": {"name": name_of(self.engine), "options": asdict(self.engine)},
            "federation": self.federation,
            "base": str(base.resolve()),
            "jobs": [
                {"label": job.label, "seed": job.seed, "folder": str(job.path.relative_to(folder))} for job in self.jobs
            ],
        }


def start(experiment: Experiment, folder: Path, session: Session, log: Log) -> Iterator[Event]:
    """Begin a session in a new folder; all that can be known to fail fails before the folder is made.

    Raises:
        CeloraError: any of celora.errors.
    """
    labels, resources = list(dict.fromkeys(job.label for job in session.jobs)), ResourceCache()
    for seed in dict.fromkeys(job.seed for job in session.jobs):
        for label in labels:
            try:
                session.engine.check(experiment.variant(label, seed), resources)
            except ValueError as error:
                raise ConfigError([f"{label}: {error}"]) from error
    if session.match == "floats":  # from here on the ranks are part of what was written, so that resuming knows them
        experiment = budget.matched(experiment, labels, resources.modules)
    saved, run = session.saved(folder, experiment.base), RunFolder.create(folder)
    with run.lock():
        run.write("experiment.toml", written(experiment))
        run.write_json(FILE, saved)
        yield from _events(experiment, folder, session, resources, log)


def resume(folder: Path, log: Log) -> Iterator[Event]:
    """Continue a session where its last whole round ended; jobs that are done are not repeated.

    Raises:
        RunFolderError: if there is nothing to resume here, or another version of celora has begun it.
    """
    run = RunFolder(folder)
    saved = run.read_json(FILE)
    if saved is None:
        inner = f" ({folder.parent} can be resumed)" if (folder.parent / FILE).exists() else ""
        raise RunFolderError(f"{folder} is not a run folder: found no {FILE}{inner}; expected runs/<name>")
    jobs = [Job(job["label"], job["seed"], folder / job["folder"]) for job in saved["jobs"]]
    if saved.get("schema") != SCHEMA:
        yield from _done_elsewhere(folder, saved, jobs)
        return
    engine = saved["engine"]
    if engine["name"] not in ENGINES:
        names = ", ".join(ENGINES)
        raise RunFolderError(f"{folder / FILE}: found the engine {engine['name']!r}, expected one of {names}")
    session = Session(
        kind=saved["kind"],
        jobs=jobs,
        match=saved["match"],
        engine=ENGINES[engine["name"]].load()(**engine["options"]),
        federation=saved["federation"],
    )
    experiment = replace(read(folder / "experiment.toml"), base=Path(saved["base"]))
    with run.lock():
        yield from _events(experiment, folder, session, ResourceCache(), log)


def _done_elsewhere(folder: Path, saved: dict[str, Any], jobs: Sequence[Job]) -> Iterator[Event]:
    """The events of a session in another layout, all of whose jobs are done.

    Raises:
        RunFolderError: if there is a job to resume.
    """
    summaries = [summary for job in jobs if (summary := job.summary()) is not None]
    if len(summaries) < len(jobs):
        manifests = [job.folder.read_json("manifest.json") or {} for job in jobs]
        wrote = saved.get("celora") or next((m["versions"]["celora"] for m in manifests if m), "an unknown version")
        raise RunFolderError(
            f"{folder} was begun by celora {wrote} with layout {saved.get('schema', 0)} of run folders; this is celora "
            f"{version('celora')}, which resumes layout {SCHEMA}: resume it with the version that began it, or start "
            f"it again in another folder (jobs that are done have their summaries)"
        )
    yield _opening(folder, saved["kind"], jobs, summaries[0]["rounds"])
    for job, summary in zip(jobs, summaries, strict=True):
        yield stamped(job.end(summary))
    yield _closing(folder, saved["kind"], summaries)


def _events(
    experiment: Experiment, folder: Path, session: Session, resources: ResourceCache, log: Log
) -> Iterator[Event]:
    """Every event of a session; the engine is opened when the first job needs it."""
    yield _opening(folder, session.kind, session.jobs, experiment.plan.rounds)
    context = SessionContext(experiment, resources, folder, session.federation, log)
    local_only = {job.seed: job for job in session.jobs if job.label == "local"}
    summaries: list[dict[str, Any]] = []
    with ExitStack() as opened:
        runtime: Runtime | None = None
        for job in session.jobs:
            try:
                if (summary := job.summary()) is not None:
                    yield stamped(job.end(summary))
                else:
                    if runtime is None:
                        runtime = opened.enter_context(session.engine.open(context))
                    twin = local_only.get(job.seed)
                    yield from run_job(
                        job,
                        experiment.variant(job.label, job.seed),
                        runtime,
                        resources,
                        at_sites=session.at_sites(job),
                        match=session.match,
                        local_only=twin if twin != job else None,
                    )
            except (KeyboardInterrupt, GeneratorExit, QuorumError, FederationError) as reason:
                job.folder.event({"event": "stopped", **job.names, "why": str(reason) or type(reason).__name__})
                raise
            summaries.append(job.folder.read_json("summary.json"))
    if session.kind == "compare":
        RunFolder(folder).write_json("compare.json", summaries)
    yield _closing(folder, session.kind, summaries)


def _opening(folder: Path, kind: Kind, jobs: Sequence[Job], rounds: int) -> Event:
    """The first event of a session."""
    states = [{**job.names, "folder": str(job.path), "done": job.summary() is not None} for job in jobs]
    return stamped({"event": "session", "folder": str(folder), "kind": kind, "jobs": states, "rounds": rounds})


def _closing(folder: Path, kind: Kind, summaries: Sequence[dict[str, Any]]) -> Event:
    """The last event of a session."""
    compared = str(folder / "compare.json") if kind == "compare" else None
    return stamped({"event": "session_end", "folder": str(folder), "summaries": summaries, "compare": compared})
