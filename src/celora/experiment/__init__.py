"""What a user of experiments calls.

    for event in run(read(Path("demo.toml"))):
        ...

`run`, `compare` and `resume` are iterators of the events that they write to the journal. The caller owns the loop,
shows what it likes, and may stop at any moment: what is on disk can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celora.experiment.engines import engine_named
from celora.lazy import Lazy

if TYPE_CHECKING:
    from celora.experiment import budget, config, job, runtimes, session
    from celora.experiment.config import Experiment, read, resolve
    from celora.experiment.runtimes import Engine, Log
    from celora.track.folder import Event
else:  # a mistake in a configuration is told before anything is imported that trains
    config, budget = Lazy("celora.experiment.config"), Lazy("celora.experiment.budget")
    runtimes, job = Lazy("celora.experiment.runtimes"), Lazy("celora.experiment.job")
    session = Lazy("celora.experiment.session")

__all__ = ["Engine", "Experiment", "Log", "compare", "read", "resolve", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name in ("Experiment", "read", "resolve"):
        return getattr(config, name)
    if name in ("Engine", "Log"):
        return getattr(runtimes, name)
    raise AttributeError(f"module 'celora.experiment' has no attribute {name!r}")


def ignore(text: str) -> None:
    """A `Log` for whoever wants events only."""


def run(
    experiment: Experiment,
    folder: Path | None = None,
    *,
    twin: bool = True,
    engine: str | Engine = "embedded",
    log: Log = ignore,
) -> Iterator[Event]:
    """Run the experiment's algorithm, after its local-only twin of equal budget (in the sub-folder `local`).

    Args:
        folder: of the run; `runs/<name>` if not given.
        twin: False leaves the twin out, and with it every lift; for sweeps that have run it once.
        engine: where the clients are: a name in `celora.experiment.engines.ENGINES`, or an engine with its options.

    Raises:
        CeloraError: any of celora.errors; the folder is then as it was, or can be resumed.
    """
    root, labels = folder or Path("runs") / experiment.name, [experiment.label]
    if twin and experiment.label != "local":
        labels.insert(0, "local")
    config.check_labels(experiment, labels)
    chosen, seed = engine_named(engine) if isinstance(engine, str) else engine, experiment.plan.seed
    jobs = [job.Job(label, seed, root if label == experiment.label else root / label) for label in labels]
    yield from session.start(experiment, root, session.Session("run", jobs, engine=chosen), log)


def compare(
    experiment: Experiment,
    labels: Sequence[str],
    seeds: Sequence[int],
    folder: Path | None = None,
    *,
    match: str = "rank",
) -> Iterator[Event]:
    """Run several algorithms, each with every seed, on the same clients; local-only is always among them.

    Writes `compare.json`, a list of summaries. Labels are algorithm names or labels of `[overrides]`.

    Args:
        match: "rank": all have the rank that is written; "floats": each has the rank at which it sends as much as FedIT
            would at that one (celora.experiment.budget).

    Raises:
        CeloraError: any of celora.errors; the folder is then as it was, or can be resumed.
    """
    matched, root = budget.match_of(match), folder or Path("runs") / experiment.name
    labels, many = list(dict.fromkeys(["local", *labels])), len(seeds) > 1
    config.check_labels(experiment, labels)
    jobs = [job.Job(a, s, root / a / f"seed-{s}" if many else root / a) for s in dict.fromkeys(seeds) for a in labels]
    yield from session.start(experiment, root, session.Session("compare", jobs, match=matched), ignore)


def resume(folder: Path, log: Log = ignore) -> Iterator[Event]:
    """Continue a run or a comparison where its last whole round ended; jobs that are done are not repeated.

    Raises:
        RunFolderError: if there is nothing to resume here, or another version of celora has begun it.
    """
    yield from session.resume(folder, log)
