"""Every method on two real text data sets, at equal local budgets: who gains, who is harmed, and for how many bytes.

    python benchmarks/methods.py --data FOLDER [--out runs/methods] [--workers 2]
    python benchmarks/methods.py --data FOLDER --tiny        # every step in minutes, with numbers that mean nothing

FOLDER (or the environment variable CELORA_DATA) holds banking77/ and multidomain_sentiment/, as benchmarks/text.py
wants them; what is not there is skipped. Data, rows and mini-batches are those of benchmarks/text.py, for six rounds,
and the same for every method: the top two layers of MiniLM are adapted, so that the work below them is done once. A
method that fits twice in a turn (Ditto, pFedLoRA …) takes twice the steps, as its seconds show.

1. tune   each method's learning rate, from one grid, by mean validation score on a pilot seed used for nothing else
2. run    every method with its rate and with each of the seeds, each with its own partition, initialisation and order
3. tell   a table for each data set, best mean client score first, as Markdown; all numbers in
          benchmarks/results/methods.json (of a part of the methods, or a tiny run: in --out)

A run that is done is not repeated and one that was cut off is resumed: start the same command again. A method that
fails is left out of the tables and told at the end. A FedIT run takes about 20 s of one core, methods that do more up
to three times that; so 22 methods, five runs each on two data sets, take about an hour on two free cores.

    harmed      share of (seed, client) pairs below the same client's local-only run, at that one's own learning rate
    bytes       all frames, up and down, of all clients, until the method's mean validation score (either moment) first
                is 95 % of the best that any method has with that seed; validation runs every second round
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.algorithms import ALGORITHMS
from celora.track.folder import RunFolder
from measure import save
from sweep import Summary, Tree, merged, sweep
from text import DATASETS, GRID, TUNING_SEED, paired, validation

SEEDS = (0, 1)
SHARE = 0.95
OWN_RATES, DESCENT = {"pfedme": ("inner_lr",), "per-fedavg": ("alpha", "beta")}, 50
"""Methods that step by plain descent at rates of their own; the grid is scaled for them."""
BUDGET: Tree = {"adapter": {"layers": "last:2"}, "plan": {"rounds": 6, "evaluate_every": 2}}
TINY: Tree = {
    "data": {"rows": 8, "max_validation": 10, "max_test": 10},
    "adapter": {"layers": "last:1"},
    "plan": {"rounds": 2, "evaluate_every": 1},
}
COLUMNS = ("method", "lr", "mean", "worst decile", "lift over local (95 %)", "harmed", "moment",
           "up / client, round", f"bytes to {SHARE:.0%}", "seconds")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("CELORA_DATA") or None, help="default: CELORA_DATA")
    parser.add_argument("--out", type=Path, help="run folders; default: runs/methods, or runs/methods-tiny")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", help="only these, separated by commas; local is added")
    parser.add_argument("--tiny", action="store_true", help="8 rows, 2 rounds, one layer, two rates, one seed")
    arguments = parser.parse_args()
    methods = list(dict.fromkeys(["local", *(arguments.methods.split(",") if arguments.methods else ALGORITHMS)]))
    if unknown := [name for name in methods if name not in ALGORITHMS]:
        sys.exit(f"--methods: there is no {', '.join(unknown)}; expected some of {', '.join(ALGORITHMS)}")
    base, datasets = found(arguments.data)
    tiny, grid, seeds = arguments.tiny, GRID[:2] if arguments.tiny else GRID, SEEDS[:1] if arguments.tiny else SEEDS
    out = arguments.out or Path("runs/methods-tiny" if tiny else "runs/methods")
    cells = {d: merged(DATASETS[d], TINY if tiny else BUDGET) for d in datasets}
    failed: dict[str, str] = {}
    count = len(cells) * len(methods)
    print(f"{count * len(grid)} runs to tune, then {count * len(seeds)}; in {out}", file=sys.stderr)
    rates = tune(cells, methods, grid, base, out, arguments.workers, failed)
    runs = {
        place(d, m, rate, s): merged(cells[d], stepping(m, rate), {"plan": {"seed": s}})
        for (d, m), rate in rates.items()
        for s in seeds
    }
    done = sweep(runs.items(), base, out, arguments.workers, failed)
    tables, sections = list[str](), dict[str, Any]()
    for d in cells:
        of_method = {
            m: [done[name] for s in seeds if (name := place(d, m, rates[d, m], s)) in done]
            for m in methods
            if (d, m) in rates
        }
        whole = {m: summaries for m, summaries in of_method.items() if len(summaries) == len(seeds)}
        if "local" not in whole:
            continue
        rows = tell({m: rates[d, m] for m in whole}, whole, grid)
        sections[d] = {"rows": rows}
        tables.append(f"### {d}\n\n{markdown(rows, len(seeds))}")
    text = "\n\n".join(tables) + "\n"
    (out / "methods.md").write_text(text)
    print(f"\n{text}")
    settings = {"budget": cells, "grid": grid, "seeds": seeds, "pilot_seed": TUNING_SEED}
    if tiny or arguments.methods or failed:
        (out / "methods.json").write_text(json.dumps({**sections, "settings": settings}, indent=1) + "\n")
    else:
        save("methods", sections, settings=settings)
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def found(data: Path | str | None) -> tuple[Path, list[str]]:
    """The folder, and the data sets in it; ends the script where there is none."""
    if data is None:
        print("skipped: no data; pass --data FOLDER or set CELORA_DATA", file=sys.stderr)
        sys.exit(0)
    base = Path(data).resolve()
    there = [name for name in DATASETS if (base / name / "train.parquet").exists()]
    for name in DATASETS:
        if name not in there:
            print(f"skipped: {name}: there is no {base / name / 'train.parquet'}", file=sys.stderr)
    if not there:
        sys.exit(0)
    return base, there


def place(dataset: str, method: str, rate: float, seed: int) -> str:
    """A run's folder below --out."""
    return f"run/{dataset}/{method}/lr-{rate:g}/seed-{seed}"


def stepping(method: str, rate: float) -> Tree:
    """A method at a learning rate of the grid; plain descent takes 50 times AdamW's: a step has the gradient's size."""
    own = dict.fromkeys(OWN_RATES.get(method, ()), DESCENT * rate)
    return {"algorithm": {"name": method, **own}, "train": {"lr": rate}}


def tune(
    cells: Mapping[str, Tree],
    methods: Sequence[str],
    grid: Sequence[float],
    base: Path,
    out: Path,
    workers: int,
    failed: dict[str, str],
) -> dict[tuple[str, str], float]:
    """(data set, method) -> the learning rate of the best mean validation score; without those that failed."""
    pilot: Tree = {"plan": {"seed": TUNING_SEED}, "data": {"max_test": 1}}
    runs = {
        (d, m, lr): merged(tree, pilot, stepping(m, lr)) for d, tree in cells.items() for m in methods for lr in grid
    }
    named = {(d, m, lr): f"tune/{d}/{m}/lr-{lr:g}" for d, m, lr in runs}
    done = sweep({named[key]: tree for key, tree in runs.items()}.items(), base, out, workers, failed)
    scores = {key: validation(done[name]) for key, name in named.items() if name in done}
    rates: dict[tuple[str, str], float] = {}
    for d in cells:
        print(f"\n{d}: validation by learning rate, seed {TUNING_SEED}", file=sys.stderr)
        for m in methods:
            of_rate = {lr: scores[d, m, lr] for lr in grid if (d, m, lr) in scores}
            if len(of_rate) < len(grid):  # a rate that fails is a rate that was not tried: no fair choice
                continue
            rates[d, m] = max(of_rate, key=of_rate.__getitem__)
            row = "   ".join(f"{lr:g}: {score:.3f}" for lr, score in of_rate.items())
            print(f"  {m:14s} {row}   -> {rates[d, m]:g}", file=sys.stderr)
    return rates


def tell(rates: Mapping[str, float], done: Mapping[str, list[Summary]], grid: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each method, the best mean first."""
    targets = [
        SHARE * max(curve[-1][1] for curve in of_seed) for of_seed in zip(*map(curves, done.values()), strict=True)
    ]
    rows = []
    for method, runs in done.items():
        means = [run["metrics"]["mean"] for run in runs]
        needed = [reached(curve, target) for curve, target in zip(curves(runs), targets, strict=True)]
        rows.append(
            {
                "method": method,
                "lr": rates[method],
                "at_edge": rates[method] in (min(grid), max(grid)),
                "mean": statistics.fmean(means),
                "std": statistics.stdev(means) if len(means) > 1 else None,
                "worst_decile": statistics.fmean(run["metrics"]["worst_decile"] for run in runs),
                "lift": paired(runs, done["local"]),
                "headline": [f"{run['moment']}@{run['round']}" for run in runs],
                "bytes": runs[0]["bytes"],
                "bytes_to_target": None if None in needed else statistics.fmean(b for b in needed if b is not None),
                "reached": sum(b is not None for b in needed),
                "seconds": statistics.fmean(run["seconds"] for run in runs),
                "rank": runs[0]["settings"]["adapter"]["rank"],
            }
        )
    return sorted(rows, key=lambda row: -row["mean"])


def curves(runs: Sequence[Summary]) -> list[list[tuple[int, float]]]:
    """For each run (bytes of all clients so far, best mean validation score so far), in the order of the rounds.

    To predict in round t, with what is received or trained from it, takes the downlinks up to t and the uplinks before.
    """
    found = []
    for run in runs:
        sent, best, curve = 0, 0.0, list[tuple[int, float]]()
        for event in RunFolder(Path(run["folder"])).events():
            if event["event"] == "round":
                sent += sum(traffic["down_frame"] for traffic in event["traffic"].values())
                best = max([best, *(m["mean"] for m in event["validation"].values() if m)])
                curve.append((sent, best))
                sent += sum(traffic["up_frame"] for traffic in event["traffic"].values())
        found.append(curve)
    return found


def reached(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """Bytes at which the target is first reached."""
    return next((sent for sent, best in curve if best >= target), None)


def markdown(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """The table for docs/results.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lift, of = row["lift"], {text.split("@")[0] for text in row["headline"]}
        size, alone = row["bytes"], row["method"] == "local"
        head = f" + head {size['head']:,}" if size["head"] else ""
        once = f" + {size['summary']:,.0f} once" if size["summary"] else ""
        values = (
            row["method"],
            f"{row['lr']:g}" + (" (edge)" if row["at_edge"] else ""),
            f"{row['mean']:.3f}" + ("" if row["std"] is None else f" ± {row['std']:.3f}"),
            f"{row['worst_decile']:.3f}",
            "–" if alone else f"{lift['mean']:+.3f} [{lift['low']:+.3f}, {lift['high']:+.3f}]",
            "–" if alone else f"{lift['harmed']:.0%}",
            of.pop() if len(of) == 1 else "mixed",
            f"{size['up_payload']:,.0f}{head}{once}",
            f"– ({row['reached']} of {seeds})" if row["bytes_to_target"] is None else f"{row['bytes_to_target']:,.0f}",
            f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
