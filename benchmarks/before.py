"""Is this version slower than another one? The same jobs with both, in turns, each in a fresh process with one thread.

    python benchmarks/before.py --before SRC [--turns 4]

SRC is the `src` folder of the other version. FedIT on MiniLM, 8 clients of 32 texts, 4 steps of 4 rows, 3 rounds: all
layers adapted, clients grouped and one by one; and the top two layers, whose inputs are kept. What counts is the CPU
time of the process from the start of the job to the end of its last round, without imports and other work.

Results: a table of ratios, and benchmarks/results/before.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import celora
from measure import Spread, save, show

CONFIG = """
[data]
source = "docstrings"
clients = 8
rows = 32
max_validation = 16
max_test = 16
[model]
device = "cpu"
[adapter]
targets = ["query", "value"]
[train]
steps = 4
batch_size = 4
[plan]
rounds = 3
[algorithm]
name = "fedit"
"""
JOBS = {
    "all layers, grouped": [],
    "all layers, one by one": ["engine.group=1"],
    "last:2, activations kept": ["adapter.layers=last:2"],
}
CHILD = """
import json, sys, time
from pathlib import Path
from celora.experiment import read, run
times = {"start": [], "round": []}
for event in run(read(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), twin=False):
    if event["event"] in times:
        times[event["event"]].append(time.process_time())
(start,), rounds = times["start"], times["round"]
print(json.dumps({"first round": rounds[0] - start, "later rounds": rounds[-1] - rounds[0], "all": rounds[-1] - start}))
"""


def timed(source: Path, sets: list[str]) -> dict[str, float]:
    """CPU seconds of one process."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (config := Path(folder, "run.toml")).write_text(CONFIG)
        command = [sys.executable, "-c", CHILD, str(config), f"{folder}/run", *sets]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, metavar="SRC")
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "now": Path(celora.__path__[0]).parent}
    taken: dict[str, dict[str, list[dict[str, float]]]] = {job: {tree: [] for tree in trees} for job in JOBS}
    for _ in range(arguments.turns):
        for job, sets in JOBS.items():
            for tree, source in trees.items():
                taken[job][tree].append(timed(source, sets))
    rows, found = [], {}
    for job, of in taken.items():
        spreads = {
            what: {tree: Spread(tuple(turn[what] for turn in turns)) for tree, turns in of.items()}
            for what in of["now"][0]
        }
        ratios = {what: both["now"].over(both["before"]) for what, both in spreads.items()}
        rows.append({"job": job, **{f"now / before, {what}": str(ratio) for what, ratio in ratios.items()}})
        found[job] = {
            what: {"ratio": ratios[what].json(), **{tree: one.json() for tree, one in both.items()}}
            for what, both in spreads.items()
        }
    show("CPU time of the process, this version over the other", rows)
    print(save("before", {"jobs": found}, settings={"turns": arguments.turns}))


if __name__ == "__main__":
    main()
