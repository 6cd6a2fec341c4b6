"""Three sites and a server, each a process of its own, over TLS with keys, on shards of banking77: equal to the run in
which all clients are in one process, bit for bit."""

import csv
import json
import os
import subprocess  # real processes
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.slow.federation import SITES, Federation, celora, federation

BANKING = Path(__file__).parents[3] / "shared" / "data" / "banking77" / "train.parquet"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BANKING.exists(), reason=f"there is no {BANKING}: the data set is not part of the project"),
]
CONFIG = """
name = "banks"

[data]
source = "*.csv"
rows = 24
max_validation = 12
max_test = 16

[adapter]
layers = "last:2"

[train]
lr = 6e-3

[plan]
rounds = 3

[engine]
group = 1     # one client after another, as at sites
"""


def shards(fed: Federation) -> None:
    """Each site has 16 of the 77 labels, eight of them its own and four shared with each of the others."""
    table = pq.read_table(BANKING).to_pydict()
    labels = sorted(set(table["label_text"]))
    for position, site in enumerate(SITES):
        others = [name for i, name in enumerate(labels[24:36]) if i // 4 != position]
        mine = {*labels[8 * position : 8 * position + 8], *others}
        rows = [row for row in zip(table["text"], table["label_text"], strict=True) if row[1] in mine]
        with open(fed.shard(site), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern)}


def journal(folder: Path) -> list[dict[str, Any]]:
    """Rounds, but for how long they took and what sockets carried."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    for event in rounds:
        del event["time"], event["seconds"], event["clients"]
        for traffic in event["traffic"].values():
            del traffic["up_socket"], traffic["down_socket"]
    return rounds


def test_three_sites_on_banking77_equal_the_embedded_run_bit_for_bit(tmp_path: Path) -> None:
    with federation(tmp_path) as fed:
        (fed.root / "config.toml").write_text(CONFIG)
        for spare in fed.root.glob("*.csv"):
            spare.unlink()
        shards(fed)
        for algorithm in ("ce-lora", "fedit"):
            chosen = ("--set", f"algorithm.name={algorithm}")
            run = fed.run(algorithm, *chosen)
            assert run.ends(300) == 0
            alone = fed.root / f"{algorithm}-embedded"
            command = celora("run", fed.root / "config.toml", *chosen, "--out", alone, "--quiet")
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            for twin in ("", "local"):
                here, there = run.out / twin, alone / twin
                assert journal(here) == journal(there)
                assert files(here, "state/round_*/server.bin") == files(there, "state/round_*/server.bin") != {}
                mine, theirs = (json.loads((at / "summary.json").read_text()) for at in (here, there))
                for name in ("metrics", "moments", "last", "moment", "round", "excluded_replies"):
                    assert mine[name] == theirs[name]
                assert mine["excluded_replies"] == {} and mine["bytes"]["up_socket"] > mine["bytes"]["up_frame"]
            for site in SITES:
                kept = run.kept(site, algorithm) / "adapter"
                assert files(kept, "*.safetensors") == files(alone / "adapters" / site, "*.safetensors") != {}
