"""Does federating beat training alone? Five methods and CE-LoRA's controls on two real text data sets.

    python benchmarks/text.py --data ../shared/data [--out runs/text] [--workers 2]

1. tune   each method's learning rate, from one grid, by mean validation score on a seed that is used for nothing else;
          the controls of CE-LoRA take its own rate, but for the one with frozen bases, which is tuned by itself
2. run    every method with three seeds, each with its own partition, initialisation and order of rows
3. tell   mean ± standard deviation over seeds, worst decile, lift over local-only and over the controls with a
          paired 95 % bootstrap interval over (seed, client) pairs, and bytes: to the screen and to
          benchmarks/results/text.json

Test rows are scored once a run, after the round and the moment have been chosen on validation. A run that is done is
not repeated: start the same command again after an interruption.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sweep import Summary, Tree, merged, sweep

SEEDS, TUNING_SEED = (0, 1, 2), 100
MOMENTS = ("received", "personal")
GRID = (2e-3, 6e-3, 2e-2)

DATASETS: dict[str, Tree] = {
    "banking77": {
        "data": {
            "source": "banking77/train.parquet", "test": "banking77/test.parquet", "label": "label_text",
            "partition": "dirichlet", "alpha": 0.3, "clients": 10, "rows": 40, "max_validation": 20, "max_test": 40,
        },
        "model": {"max_length": 32},
        "plan": {"rounds": 8, "evaluate_every": 2},
    },
    "multidomain_sentiment": {
        "data": {
            "source": "multidomain_sentiment/train.parquet", "test": "multidomain_sentiment/test.parquet",
            "label": "label_text", "client": "domain", "partition": "natural", "clients_per_group": 2,
            "rows": 32, "max_validation": 20, "max_test": 40,
        },
        "model": {"max_length": 32},
        "plan": {"rounds": 6, "evaluate_every": 2},
    },
}  # fmt: skip

FROZEN: Tree = {"algorithm": {"name": "ce-lora", "freeze_bases": True}, "adapter": {"init": "orthonormal"}}
METHODS: dict[str, Tree] = {
    "local": {"algorithm": {"name": "local"}},
    "fedit": {"algorithm": {"name": "fedit"}},
    "ffa-lora": {"algorithm": {"name": "ffa-lora"}},
    "fedsa-lora": {"algorithm": {"name": "fedsa-lora"}},
    "ce-lora": {"algorithm": {"name": "ce-lora"}},
    "ce-lora, A and B frozen": FROZEN,
}
CONTROLS: dict[str, Tree] = {
    f"ce-lora, {rule}": {"algorithm": {"name": "ce-lora", "rule": rule}} for rule in ("uniform", "reset", "permuted")
}


def validation(summary: Summary) -> float:
    """Mean validation score of the moment and round that the run chose."""
    return float(summary["moments"][summary["moment"]]["validation"])


def tune(base: Path, out: Path, workers: int) -> dict[str, dict[str, float]]:
    """Data set -> method -> learning rate."""
    runs = {
        f"tune/{dataset}/{method}/{lr:g}": merged(
            tree, setting, {"train": {"lr": lr}, "plan": {"seed": TUNING_SEED}, "data": {"max_test": 1}}
        )
        for dataset, tree in DATASETS.items()
        for method, setting in METHODS.items()
        for lr in GRID
    }
    done = sweep(runs.items(), base, out, workers)
    scores = {tuple(name.split("/")[1:]): validation(summary) for name, summary in done.items()}
    rates = {
        dataset: {m: max(GRID, key=lambda lr: scores[dataset, m, f"{lr:g}"]) for m in METHODS} for dataset in DATASETS
    }
    for dataset, of_method in rates.items():
        print(f"\n{dataset}: validation by learning rate, seed {TUNING_SEED}")
        for method, chosen in of_method.items():
            row = "   ".join(f"{lr:g}: {scores[dataset, method, f'{lr:g}']:.3f}" for lr in GRID)
            print(f"  {method:26s} {row}   -> {chosen:g}")
    return rates


def average(numbers: Iterable[float]) -> float:
    return float(np.mean(list(numbers)))


def paired(one: list[Summary], other: list[Summary]) -> dict[str, float]:
    """Mean difference of client scores over (seed, client) pairs, its 95 % bootstrap interval, share below 0."""
    differences = np.array([
        a["clients"][client]["score"] - b["clients"][client]["score"]
        for a, b in zip(one, other, strict=True)
        for client in a["clients"]
    ])  # fmt: skip
    draws = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"mean": differences.mean(), "low": low, "high": high, "harmed": float((differences < 0).mean())}


def tell(dataset: str, rates: dict[str, float], done: dict[str, list[Summary]]) -> list[dict[str, Any]]:
    """The rows of one data set's table."""
    rows: list[dict[str, Any]] = []
    print(f"\n{dataset}: {len(SEEDS)} seeds\n")
    columns = "method|lr|mean|worst decile|lift over local (95 %)|harmed|received|personal|up / client, round"
    print(f"| {columns.replace('|', ' | ')} |\n|{'---|' * 9}")
    for method, runs in done.items():
        means = [run["metrics"]["mean"] for run in runs]
        deciles = [run["metrics"]["worst_decile"] for run in runs]
        lift = paired(runs, done["local"])
        moments = {m: average(run["moments"][m]["metrics"]["mean"] for run in runs) for m in MOMENTS}
        moments |= {f"last {m}": average(run["last"][m]["metrics"]["mean"] for run in runs) for m in MOMENTS}
        size = runs[0]["bytes"]
        up = f"{size['up_payload']} + head {size['head']}" if size["head"] else f"{size['up_payload']}"
        up += f" + {size['summary']:.0f} once" if size["summary"] else ""
        row = {
            "dataset": dataset, "method": method, "lr": rates[method], "mean": float(np.mean(means)),
            "std": float(np.std(means, ddof=1)), "worst_decile": float(np.mean(deciles)), "lift": lift, **moments,
            "bytes": size, "seconds": float(np.mean([run["seconds"] for run in runs])),
            "headline": [f"{run['moment']}@{run['round']}" for run in runs],
        }  # fmt: skip
        if method.startswith("ce-lora,"):
            row["ce_lora_minus_this"] = paired(done["ce-lora"], runs)
        rows.append(row)
        gain = "–" if method == "local" else f"{lift['mean']:+.3f} [{lift['low']:+.3f}, {lift['high']:+.3f}]"
        harmed = "–" if method == "local" else f"{lift['harmed']:.0%}"
        print(
            f"| {method} | {rates[method]:g} | {row['mean']:.3f} ± {row['std']:.3f} | {row['worst_decile']:.3f} | "
            f"{gain} | {harmed} | {moments['received']:.3f} | {moments['personal']:.3f} | {up} |"
        )
    print("\nCE-LoRA minus its controls:")
    for row in rows:
        if "ce_lora_minus_this" in row:
            d = row["ce_lora_minus_this"]
            print(f"  {row['method']:26s} {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="folder with banking77/ and multidomain_sentiment/",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only-tune", action="store_true", help="stop after the learning rates are chosen")
    arguments = parser.parse_args()
    missing = [name for name in DATASETS if not (arguments.data / name / "train.parquet").exists()]
    if missing:
        sys.exit(f"skipped: {arguments.data} has no {', '.join(missing)}; pass --data FOLDER")
    base = arguments.data.resolve()
    rates = tune(base, arguments.out, arguments.workers)
    if arguments.only_tune:
        return
    for of_method in rates.values():
        of_method.update(dict.fromkeys(CONTROLS, of_method["ce-lora"]))
    settings = {**METHODS, **CONTROLS}
    runs = {
        f"run/{d}/{m}/{s}": merged(tree, setting, {"train": {"lr": rates[d][m]}, "plan": {"seed": s}})
        for d, tree in DATASETS.items()
        for m, setting in settings.items()
        for s in SEEDS
    }
    done = sweep(runs.items(), base, arguments.out, arguments.workers)
    rows = [
        row
        for d in DATASETS
        for row in tell(d, rates[d], {m: [done[f"run/{d}/{m}/{s}"] for s in SEEDS] for m in settings})
    ]
    target = Path(__file__).parent / "results" / "text.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
