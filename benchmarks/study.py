"""A comparison of methods on data sets: rates by validation on a pilot seed, then seeds, then a table.

1. tune   each method's learning rate on each data set, from one grid, by mean validation score on a pilot seed used for
          nothing else
2. run    every method with its rate and with each of the seeds, each with its own partition, initialisation and order
3. tell   a table for each data set, best mean client score first, as Markdown

Test rows are scored once a run, after the round and the moment have been chosen on validation. A run that is done is
not repeated and one that was cut off is resumed: start the same command again.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import save
from sweep import Summary, Tree, merged, sweep
from text import SEEDS, TUNING_SEED, paired

Rated = Callable[[float], Tree]
"""A learning rate -> the settings of a method at it."""
COLUMNS = ("method", "lr", "mean", "worst client", "lift over local (95 %)", "harmed", "moment", "up / client, round",
           "seconds")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A data set with its budget.

    Attributes:
        tree: settings that all methods share.
        grid: learning rates.
        needs: files below the data folder; the cell is skipped where one is missing.
        untrained: whether the model before any training has a score worth telling, as a language model's has.
    """

    tree: Tree
    grid: Sequence[float]
    needs: Sequence[str] = ()
    untrained: bool = False


def at_rate(*settings: Tree) -> Rated:
    """A method that steps by AdamW."""
    return lambda rate: merged(*settings, {"train": {"lr": rate}})


def method(name: str, **settings: object) -> Tree:
    return {"algorithm": {"name": name, **settings}}


UNTRAINED: Tree = {**method("local"), "train": {"lr": 1e-12, "steps": 1}, "plan": {"rounds": 1, "evaluate_every": 1}}
"""The model as it is before training: one step that changes nothing."""


def goodness(summary: Summary) -> float:
    """The mean validation score of the moment and round that the run chose; higher is better."""
    score = float(summary["moments"][summary["moment"]]["validation"])
    return score if summary["headline"]["higher_is_better"] else -score


def place(kind: str, cell: str, label: str, rate: float, seed: int) -> str:
    """A run's folder below --out."""
    return f"{kind}/{cell}/{label}/lr-{rate:g}/seed-{seed}"


def tune(
    cells: Mapping[str, Cell], methods: Mapping[str, Rated], base: Path, out: Path, workers: int, failed: dict[str, str]
) -> dict[tuple[str, str], float]:
    """(data set, method) -> the learning rate of the best mean validation score; without those that failed."""
    pilot: Tree = {"plan": {"seed": TUNING_SEED}, "data": {"max_test": 1}}
    runs = {
        (c, m, lr): merged(cell.tree, rated(lr), pilot)
        for c, cell in cells.items()
        for m, rated in methods.items()
        for lr in cell.grid
    }
    named = {key: place("tune", *key, TUNING_SEED) for key in runs}
    done = sweep({named[key]: tree for key, tree in runs.items()}.items(), base, out, workers, failed)
    scores = {key: goodness(done[name]) for key, name in named.items() if name in done}
    rates: dict[tuple[str, str], float] = {}
    for c, cell in cells.items():
        print(f"\n{c}: validation by learning rate, seed {TUNING_SEED}", file=sys.stderr)
        for m in methods:
            of_rate = {lr: scores[c, m, lr] for lr in cell.grid if (c, m, lr) in scores}
            if len(of_rate) < len(cell.grid):  # a rate that fails is a rate that was not tried: no fair choice
                continue
            rates[c, m] = max(of_rate, key=of_rate.__getitem__)
            row = "   ".join(f"{lr:g}: {abs(score):.3f}" for lr, score in of_rate.items())
            print(f"  {m:14s} {row}   -> {rates[c, m]:g}", file=sys.stderr)
    return rates


def rows_of(
    rates: Mapping[str, float], done: Mapping[str, list[Summary]], grid: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each method, the best mean first."""
    rows = []
    for label, runs in done.items():
        higher = runs[0]["headline"]["higher_is_better"]
        worst = min if higher else max
        means = [run["metrics"]["mean"] for run in runs]
        rows.append(
            {
                "method": label,
                "lr": rates.get(label),
                "at_edge": len(grid) > 1 and rates.get(label) in (min(grid), max(grid)),
                "metric": runs[0]["headline"]["metric"],
                "higher_is_better": higher,
                "mean": statistics.fmean(means),
                "std": statistics.stdev(means) if len(means) > 1 else None,
                "worst": statistics.fmean(worst(c["score"] for c in run["clients"].values()) for run in runs),
                "lift": lift(runs, done["local"], higher),
                "headline": [f"{run['moment']}@{run['round']}" for run in runs],
                "bytes": runs[0]["bytes"],
                "seconds": statistics.fmean(run["seconds"] for run in runs),
                "clients": len(runs[0]["clients"]),
            }
        )
    return sorted(rows, key=lambda row: row["mean"], reverse=rows[0]["higher_is_better"])


def lift(runs: list[Summary], local: list[Summary], higher: bool) -> dict[str, float]:
    """How much better than local-only over (seed, client) pairs: mean, its 95 % bootstrap interval, share harmed."""
    return paired(runs, local) if higher else paired(local, runs)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for docs/results.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        over, of = row["lift"], {text.split("@")[0] for text in row["headline"]}
        size, alone = row["bytes"], row["method"] == "local"
        head = f" + head {size['head']:,.0f}" if size["head"] else ""
        once = f" + {size['summary']:,.0f} once" if size["summary"] else ""
        rate = "–" if row["lr"] is None else f"{row['lr']:g}" + (" (edge)" if row["at_edge"] else "")
        values = (
            row["method"],
            rate,
            f"{row['mean']:.3f}" + ("" if row["std"] is None else f" ± {row['std']:.3f}"),
            f"{row['worst']:.3f}",
            "–" if alone else f"{over['mean']:+.3f} [{over['low']:+.3f}, {over['high']:+.3f}]",
            "–" if alone else f"{over['harmed']:.0%}",
            of.pop() if len(of) == 1 else "mixed",
            f"{size['up_payload']:,.0f}{head}{once}",
            f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def study(
    name: str,
    about: str | None,
    cells_of: Callable[[Path, Path], Mapping[str, Cell]],
    methods: Mapping[str, Rated],
    tiny: Tree,
) -> None:
    """The command line of a comparison, from its arguments to its tables.

    Args:
        name: of benchmarks/results/<name>.json, and of the folder in runs/.
        about: the script's docstring.
        cells_of: (data folder, --out) -> the data sets by name; it may write files below --out for them.
        tiny: what makes all cells small.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("CELORA_DATA") or None, help="default: CELORA_DATA")
    parser.add_argument("--out", type=Path, help=f"run folders; default: runs/{name}, or runs/{name}-tiny")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="some of the data sets, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="few rows, one rate, one seed: do all steps work?")
    arguments = parser.parse_args()
    out = (arguments.out or Path(f"runs/{name}-tiny" if arguments.tiny else f"runs/{name}")).resolve()
    base = Path(arguments.data or ".").resolve()
    out.mkdir(parents=True, exist_ok=True)
    cells = cells_of(base, out)
    wanted = arguments.only.split(",") if arguments.only else list(cells)
    if strange := [cell for cell in wanted if cell not in cells]:
        sys.exit(f"--only: found {', '.join(strange)}; expected some of {', '.join(cells)}")
    seeds = SEEDS[:1] if arguments.tiny else SEEDS
    there = {c: cell for c, cell in cells.items() if c in wanted and present(c, cell, arguments.data)}
    if arguments.tiny:
        there = {c: Cell(merged(cell.tree, tiny), cell.grid[:1], (), cell.untrained) for c, cell in there.items()}
    if not there:
        return
    failed: dict[str, str] = {}
    rates = tune(there, methods, base, out, arguments.workers, failed)
    chosen = {(c, m): (rate, methods[m](rate)) for (c, m), rate in rates.items()}
    chosen |= {(c, "untrained"): (0.0, UNTRAINED) for c, cell in there.items() if cell.untrained}
    runs = {
        place("run", c, m, rate, seed): merged(there[c].tree, tree, {"plan": {"seed": seed}})
        for (c, m), (rate, tree) in chosen.items()
        for seed in seeds
    }
    done = sweep(runs.items(), base, out, arguments.workers, failed)
    sections, tables = dict[str, Any](), list[str]()
    for c, cell in there.items():
        of_method = {m: [place("run", c, m, rate, s) for s in seeds] for (d, m), (rate, _) in chosen.items() if d == c}
        whole = {m: [done[at] for at in at_all] for m, at_all in of_method.items() if all(at in done for at in at_all)}
        if "local" not in whole:
            continue
        rows = rows_of({m: rate for (d, m), rate in rates.items() if d == c}, whole, cell.grid)
        told = json.loads(json.dumps(cell.tree).replace(json.dumps(f"{out}{os.sep}")[1:-1], ""))  # no path of a machine
        sections[c] = {"rows": rows, "tree": told, "grid": cell.grid, "seeds": seeds, "pilot_seed": TUNING_SEED}
        tables.append(f"### {c}: {rows[0]['metric']}\n\n{markdown(rows)}")
    text = "\n\n".join(tables) + "\n"
    (out / f"{name}.md").write_text(text)
    print(f"\n{text}")
    if arguments.tiny or failed:
        (out / f"{name}.json").write_text(json.dumps(sections, indent=1) + "\n")
    else:
        save(name, sections, settings={})
    for at, why in failed.items():
        print(f"failed: {at}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def present(name: str, cell: Cell, data: Path | None) -> bool:
    """Whether a cell's files are there; told where they are not."""
    if cell.needs and data is None:
        print(f"skipped: {name}: pass --data FOLDER or set CELORA_DATA", file=sys.stderr)
        return False
    missing = [file for file in cell.needs if data and not (Path(data) / file).exists()]
    if missing:
        print(f"skipped: {name}: there is no {Path(data or '') / missing[0]}", file=sys.stderr)
    return not missing
