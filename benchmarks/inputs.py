"""What many rows cost before anything is trained: seconds until the first round, and peak memory, in fresh processes.

    python benchmarks/inputs.py                              # this tree
    python benchmarks/inputs.py --tree before=/path/to/it    # and another one, in turns
    python benchmarks/inputs.py --only parquet,images

Texts are made of words that are one token each for MiniLM. Each of 8 clients takes one step of 2 rows and scores 2, so
that the time is that of the inputs and not of the training; it is CPU time, because other work may run beside.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from measure import Spread, save, show

HERE = Path(__file__).resolve().parent.parent
TOKENS = 200
CONFIG = """
[data]
source = "{source}"
{columns}
clients = 8
partition = "iid"
max_validation = 2
max_test = 2

[model]
device = "cpu"
{model}

[train]
steps = 1
batch_size = 2

[plan]
rounds = 1

[algorithm]
name = "{algorithm}"
"""
CHILD = """
import json, sys, time
began = time.perf_counter()
import resource
from pathlib import Path
from celora.experiment import read, run

def peak(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 2**10

found = {"imported": time.process_time()}
for event in run(read(Path(sys.argv[1])), Path(sys.argv[2]), twin=False):
    if event["event"] in ("start", "round"):
        found[event["event"]] = time.process_time()
        found["wall at " + event["event"]] = time.perf_counter() - began
        found["peak at " + event["event"]] = peak("VmHWM")
    if event["event"] == "round":
        found["private at round"] = peak("RssAnon")
        break
print(json.dumps(found))
"""
"""`VmHWM` counts the pages of mapped files, too, which the system takes back when it needs them; `RssAnon` does not."""


def texts(count: int) -> Iterator[tuple[str, str]]:
    """Texts of `TOKENS` tokens, the two around them included, and their labels."""
    from celora.models.loading import embedded

    vocabulary = (embedded() / "vocab.txt").read_text("utf-8").split("\n")
    words = [word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2]
    draw = np.random.default_rng(0)
    for row in range(count):
        yield " ".join(words[at] for at in draw.integers(len(words), size=TOKENS - 2)), f"label {row % 10}"


def images(count: int) -> Iterator[tuple[bytes, str]]:
    """JPEG files of 32 × 32 pixels, and their labels."""
    draw = np.random.default_rng(0)
    for row in range(count):
        file = io.BytesIO()
        Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
        yield file.getvalue(), f"label {row % 10}"


def written(folder: Path, kind: str, count: int) -> Path:
    """The configuration of a data set of so many rows of this kind."""
    name = {"images": "parquet"}.get(kind, kind)
    path, is_text = folder / f"rows-{kind}.{name}", kind != "images"
    if is_text and kind != "parquet":
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if kind == "csv":
                writer.writerow(["text", "label"])
            for text, label in texts(count):
                if kind == "csv":
                    writer.writerow([text, label])
                else:
                    file.write(json.dumps({"text": text, "label": label}) + "\n")
    else:
        column, rows = ("text", texts(count)) if is_text else ("image", images(count))
        content, labels = zip(*rows, strict=True)
        pq.write_table(pa.table({column: content, "label": labels}), path)
    config = folder / f"{kind}.toml"
    config.write_text(
        CONFIG.format(
            source=path.name,
            columns="" if is_text else 'image = "image"',
            model="max_length = 256" if is_text else 'own = ["cnn-5"]',
            algorithm="fedit" if is_text else "pfedlora",
        )
    )
    return config


def measured(tree: Path, config: Path, folder: Path) -> dict[str, float]:
    """What one fresh process of a tree says."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-c", CHILD, str(config), f"{out}/run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="texts; there are a quarter as many images")
    parser.add_argument("--only", default="parquet,csv,jsonl,images")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=FOLDER", help="another tree to measure")
    options = parser.parse_args()
    trees = {**dict(one.split("=", 1) for one in options.tree), "this tree": str(HERE)}
    sections: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind in options.only.split(","):
            count = options.rows // 4 if kind == "images" else options.rows
            config = written(folder, kind, count)
            found = {name: [measured(Path(tree), config, folder) for _ in range(options.turns)]
                     for name, tree in trees.items()}  # fmt: skip
            spreads = {
                name: {what: Spread(tuple(turn[what] for turn in turns)) for what in turns[0]}
                for name, turns in found.items()
            }
            medians = [{"tree": name, **{what: one.median for what, one in s.items()}} for name, s in spreads.items()]
            note = "seconds of CPU (but for wall) since the process began; MB; medians"
            show(f"{count:,} rows, {kind}", medians, note)
            rows = {name: {what: one.json() for what, one in spread.items()} for name, spread in spreads.items()}
            sections[kind] = {"rows": count, "trees": rows}
    save("inputs", sections, settings={**vars(options), "tree": list(trees)})


if __name__ == "__main__":
    main()
