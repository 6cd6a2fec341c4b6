"""Many rows start in seconds and do not fill memory: what is not looked at stays on the disk."""

import json
import os
import subprocess  # a process of its own has a peak of its own
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

FEW, MANY, WORDS = 2_000, 200_000, 198
CONFIG = """
[data]
source = "rows.parquet"
partition = "iid"
max_validation = 2
max_test = 2
[model]
max_length = 256
device = "cpu"
[train]
steps = 1
batch_size = 2
[plan]
rounds = 1
[algorithm]
name = "fedit"
"""
FIRST_ROUND = """
import sys, time
from pathlib import Path
from celora.experiment import read, run

began = {}
for event in run(read(Path(sys.argv[1], "rows.toml")), Path(sys.argv[1], "run"), twin=False):
    began.setdefault(event["event"], time.process_time())
    if event["event"] == "round":
        break
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10, began["start"])
"""


def first_round(folder: Path, rows: int) -> tuple[float, float]:
    """Peak memory (MB), and seconds of CPU until the clients are ready, of a process that runs one round."""
    folder.mkdir()
    (folder / "rows.toml").write_text(CONFIG)
    with pq.ParquetWriter(folder / "rows.parquet", pa.schema({"text": pa.string(), "label": pa.string()})) as file:
        for start in range(0, rows, 1000):
            texts = [f"row {row} " + "word " * (WORDS - 2) for row in range(start, start + 1000)]
            file.write_table(pa.table({"text": texts, "label": [f"label {row % 10}" for row in range(1000)]}))
    command = [sys.executable, "-c", FIRST_ROUND, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    peak, ready = map(float, done.stdout.split())
    return peak, ready


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_two_hundred_thousand_texts_need_little_more_time_and_memory_than_two_thousand(tmp_path: Path) -> None:
    (few, quick), (many, slow) = first_round(tmp_path / "few", FEW), first_round(tmp_path / "many", MANY)
    print(f"{FEW} texts: {few:.0f} MB, ready after {quick:.1f} s; {MANY} texts: {many:.0f} MB, {slow:.1f} s")
    assert many <= 1.3 * few
    assert slow - quick <= 20  # some 4 seconds on an idle machine; it took 200 when all texts were tokenised first
    assert json.loads((tmp_path / "many" / "run" / "manifest.json").read_text())["data"]["sha256"]
