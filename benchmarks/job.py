"""One celora job by itself: its wall clock by rounds, its losses and its peak memory, as JSON.

    python benchmarks/job.py JOB.json OUT.json

JOB.json: {"tree": {...}, "folder": "...", "threads": 1}. Used by benchmarks/engine.py, which needs fresh processes to
compare memory, threads and whole commands.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celora.experiment.summary import peak_mb

__all__ = ["peak_mb", "run"]

Tree = dict[str, Any]


def run(tree: Tree, folder: Path, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """A celora run as a user starts it: checkpoints, journal, report and adapters included.

    Returns:
        `ends`: seconds from the start of round 1 to the end of each round, the last of which is the closing download,
        in which nobody trains; `losses`: client -> training loss, by round.
    """
    from celora import experiment

    resolved = experiment.resolve(tree, Path())
    began, ends, losses = 0.0, [], []
    for event in experiment.run(resolved, folder, twin=False):
        if event["event"] == "start":
            began = clock()
        elif event["event"] == "round":
            ends.append(clock() - began)
            losses.append({client: s["train"]["loss"] for client, s in event["scores"].items() if "train" in s})
    return {"ends": ends, "losses": [of_round for of_round in losses if of_round]}


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(job["threads"])
    found = run(job["tree"], Path(job["folder"]))
    found["peak_mb"] = peak_mb()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
