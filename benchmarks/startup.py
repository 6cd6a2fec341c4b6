"""How long a command takes from its start: whole processes, with their memory; and when a run's first round begins.

    python benchmarks/startup.py [--repetitions 5] [--before SRC] [--only "--version,list"]

SRC is the `src` folder of another version of celora, which is then measured in turns with this one.

Wall seconds, CPU seconds of the process, and the most memory it held (RSS). "first round" is the time until the
journal of the version's own examples/demo.toml says that its first job starts; the docstrings are read once before, as
they are cached. Beside it stands what torch, transformers and the weights of MiniLM take alone: no run can go below.

Results: a table, and benchmarks/results/startup.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import celora
from measure import Result, Spread, save, show

HERE = Path(__file__).parent
DEMO = "DEMO"
FLOOR = "torch and transformers alone"
LOAD = """
import torch
from transformers.models.bert.modeling_bert import BertModel
from celora.models.loading import embedded
BertModel.from_pretrained(embedded())
"""
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "--version": ("--version",),
    "--help": ("--help",),
    "completion": (),
    "list": ("list",),
    "list ce-lora": ("list", "ce-lora"),
    "keys dev": ("keys", "dev", "--out", "keys", "--sites", "site-a,site-b"),
    "a mistake in the configuration": ("run", DEMO, "--set", "adapter.rnak=4"),
    "first round": ("run", DEMO, "--set", "plan.rounds=1", "--out", "run", "--quiet"),
    FLOOR: (),
}
PATIENCE = 120.0
COMPLETION = {"_CELORA_COMPLETE": "complete_bash", "COMP_WORDS": "celora ru", "COMP_CWORD": "1"}


@dataclass(frozen=True)
class Start:
    """What one process took."""

    wall: float
    cpu: float
    rss_mb: float


def start(name: str, source: Path) -> Start:
    """Run one command with the celora that lies in `source`."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        environment = {**os.environ, "PYTHONPATH": str(source), **(COMPLETION if name == "completion" else {})}
        began = time.perf_counter()
        demo = str(source.parent / "examples" / "demo.toml")
        command = [demo if word == DEMO else word for word in COMMANDS[name]]
        process = subprocess.Popen(
            [sys.executable, *(["-c", LOAD] if name == FLOOR else ["-m", "celora", *command])],
            cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if name == "first round":
            journal = Path(folder, "run", "local", "events.jsonl")
            while not _has(journal, '"start"'):
                if time.perf_counter() - began > PATIENCE:
                    raise SystemExit(f"no round has begun after {PATIENCE} s: {COMMANDS[name]}")
                time.sleep(0.005)
            process.kill()
        _, _, used = os.wait4(process.pid, 0)
        return Start(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _has(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


def measure(names: list[str], versions: Mapping[str, Path], repetitions: int) -> Result:
    """Every command, the versions in turns; a first turn, which fills the disk's cache, is not counted."""
    found: Result = {}
    rows = []
    for name in names:
        taken: dict[str, list[Start]] = {version: [] for version in versions}
        for turn in range(repetitions + 1):
            for version, source in versions.items():
                one = start(name, source)
                if turn:
                    taken[version].append(one)
        found[name] = {}
        for version, many in taken.items():
            spreads = {
                "wall_s": Spread(tuple(one.wall for one in many)),
                "cpu_s": Spread(tuple(one.cpu for one in many)),
                "rss_mb": Spread(tuple(one.rss_mb for one in many)),
            }
            found[name][version] = {what: spread.json() for what, spread in spreads.items()}
            texts = {"wall (s)": spreads["wall_s"], "CPU (s)": spreads["cpu_s"], "RSS (MB)": spreads["rss_mb"]}
            rows.append({"command": name, "version": version} | {what: str(spread) for what, spread in texts.items()})
    show("From the command to its end, or to the first round", rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--before", type=Path, metavar="SRC")
    parser.add_argument("--only", default=",".join(COMMANDS), metavar="A,B,…")
    arguments = parser.parse_args()
    here = Path(celora.__path__[0]).parent
    versions = {**({"before": arguments.before.resolve()} if arguments.before else {}), "now": here}
    result = measure(arguments.only.split(","), versions, arguments.repetitions)
    print(save("startup", {"commands": result}, settings={"repetitions": arguments.repetitions}))


if __name__ == "__main__":
    main()
