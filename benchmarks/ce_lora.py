"""CE-LoRA's settings that the paper leaves open, one changed at a time, by validation on two data sets.

    python benchmarks/ce_lora.py --data ../shared/data [--out runs/text] [--workers 2]

Data sets, budgets and the learning rate of CE-LoRA are those of benchmarks/text.py, whose tuning it runs first if that
has not been done; the seed is its tuning seed, so nothing here is reported as a result. Writes
benchmarks/results/ce_lora.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sweep import merged, sweep
from text import DATASETS, TUNING_SEED, tune, validation

VARIANTS: dict[str, dict[str, Any]] = {
    "mean of both, gaussian, CKA of C-I, sum, natural": {},
    "data alone": {"data_share": 1.0},
    "models alone": {"data_share": 0.0},
    "product": {"combination": "product"},
    "geometric mean": {"combination": "geometric"},
    "linear kernel": {"kernel": "linear"},
    "CKA of C": {"cka_of": "C"},
    "debiased CKA": {"cka_estimator": "debiased"},
    "softmax": {"normalise": "softmax"},
    "self excluded": {"self_weight": "excluded"},
    "self fixed at 0.5": {"self_weight": "fixed"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    base = arguments.data.resolve()
    rates = tune(base, arguments.out, arguments.workers)
    runs = {
        f"ce-lora/{dataset}/{name}": merged(
            tree,
            {"algorithm": {"name": "ce-lora", **changes}, "train": {"lr": rates[dataset]["ce-lora"]}},
            {"plan": {"seed": TUNING_SEED}, "data": {"max_test": 1}},
        )
        for dataset, tree in DATASETS.items()
        for name, changes in VARIANTS.items()
    }
    done = sweep(runs.items(), base, arguments.out, arguments.workers)
    rows = [{"setting": name, **{d: validation(done[f"ce-lora/{d}/{name}"]) for d in DATASETS}} for name in VARIANTS]
    print("\n| CE-LoRA with | " + " | ".join(DATASETS) + " |\n|---|" + "---|" * len(DATASETS))
    for row in rows:
        print(f"| {row['setting']} | " + " | ".join(f"{row[d]:.3f}" for d in DATASETS) + " |")
    target = Path(__file__).parent / "results" / "ce_lora.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
