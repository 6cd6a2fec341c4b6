"""How the demo's learning rates were chosen: each method's best of one grid, by validation, on another seed.

python benchmarks/demo.py [--out runs/demo-tuning] [--workers 2]
"""

import argparse
import tomllib
from pathlib import Path

from sweep import merged, sweep
from text import GRID, TUNING_SEED, validation

METHODS = ("local", "fedit", "ffa-lora", "fedsa-lora", "ce-lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-tuning"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    demo = tomllib.loads((Path(__file__).parent.parent / "examples" / "demo.toml").read_text())
    del demo["overrides"]
    runs = {
        f"{method}/{lr:g}": merged(
            demo,
            {
                "algorithm": {"name": method},
                "train": {"lr": lr},
                "plan": {"seed": TUNING_SEED},
                "data": {"max_test": 1},
            },
        )
        for method in METHODS
        for lr in GRID
    }
    done = sweep(runs.items(), Path(), arguments.out, arguments.workers)
    for method in METHODS:
        print(f"{method:12s}" + "   ".join(f"{lr:g}: {validation(done[f'{method}/{lr:g}']):.3f}" for lr in GRID))


if __name__ == "__main__":
    main()
