"""Peak memory does not grow with the number of clients: on MiniLM, with everything that a run leaves behind."""

import json
import os
import subprocess  # a process of its own has a peak of its own
import sys
from pathlib import Path

import pytest

from celora.algorithms import ALGORITHMS

pytestmark = pytest.mark.slow

FEW, MANY = 30, 120
ADAPTER_MB = 6 * 2 * 64 * 2 * 384 * 4 / 2**20
"""Of rank 64: A and B of two modules in each of six layers. One kept of each client would be seen."""
CONFIG = """
[data]
source = "rows.jsonl"
client = "client"
split = "split"

[adapter]
rank = 64

[train]
steps = 1
batch_size = 1

[plan]
rounds = 1
"""
SIMULATION = """
import resource, sys
from pathlib import Path
from celora.experiment import read, run

folder = Path(sys.argv[1])
for event in run(read(folder / "few.toml", [f"algorithm.name={sys.argv[2]}"]), folder / "run", twin=False):
    pass
status = Path("/proc/self/status")
if status.exists():  # Linux counts the parent's peak into ru_maxrss, and the parent is a test session
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
"""


def peak_mb(folder: Path, algorithm: str, clients: int) -> float:
    """Of a process that simulates so many clients, each with a row to train on and others to score."""
    folder.mkdir()
    (folder / "few.toml").write_text(CONFIG)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(clients):
            for split in ("train", "validation", "test"):
                row = {"text": f"row {number % 7}", "label": "ab"[number % 2], "client": f"c{number}", "split": split}
                file.write(json.dumps(row) + "\n")
    command = [sys.executable, "-c", SIMULATION, folder, algorithm]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert len(summary["clients"]) == len(list((folder / "run" / "adapters").iterdir())) == clients
    assert summary["bytes"]["total"]["up_payload"] == clients * summary["bytes"]["up_payload"] > 0
    return float(done.stdout)


@pytest.mark.parametrize("algorithm", ["ce-lora"])  # the one that keeps most of each client
def test_no_adapter_of_any_client_stays_in_memory(algorithm: str, tmp_path: Path) -> None:
    assert algorithm in ALGORITHMS
    few, many = peak_mb(tmp_path / "few", algorithm, FEW), peak_mb(tmp_path / "many", algorithm, MANY)
    print(f"{algorithm}: {few:.0f} MB with {FEW} clients, {many:.0f} MB with {MANY}")
    assert many - few < 0.5 * (MANY - FEW) * ADAPTER_MB
