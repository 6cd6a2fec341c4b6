"""A server and two sites, each a process of its own, against all clients in one process."""

import json
import os
import random
import socket
import subprocess  # real processes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from celora.cli import app
from celora.experiment.summary import SOCKETS

pytest.importorskip("flwr")

CONFIG = """
[data]
source = "shards/*.csv"
rows = 24
max_validation = 6
max_test = 6

[adapter]
layers = "last:1"

[plan]
rounds = 2
seed = 3

[engine]
group = 1
"""
WORDS = {"weather": "rain sun wind cloud storm snow", "food": "bread soup apple rice cheese salt"}
SITES = ("north", "south")
OTHER = ("seconds", "peak_rss_mb", "folder", "adapters", "settings", "notices", "bytes", "clients")
"""What of a summary tells of the machine, and what is compared by itself."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    draw = random.Random(0)
    for site in SITES:
        lines = ["text,label"]
        for label, words in WORDS.items():
            lines += [f"{' '.join(draw.choices(words.split(), k=4))},{label}" for _ in range(20)]
        (tmp_path / "shards" / f"{site}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


@pytest.fixture
def start(folder: Path) -> Any:
    """celora in a process of its own, which ends with the test at the latest."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, *words: object) -> "subprocess.Popen[bytes]":
        with open(folder / f"{name}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "celora", *map(str, words)],
                    cwd=folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def rounds(run: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


def without_sockets(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: size for name, size in sizes.items() if name not in SOCKETS and name != "total"}


def test_a_server_and_two_sites_equal_the_embedded_run_and_count_what_their_sockets_carry(
    folder: Path, start: Callable[..., "subprocess.Popen[bytes]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, away, here = f"127.0.0.1:{free_port()}", folder / "away", folder / "here"
    server = start(
        "server", "server", "config.toml", "--listen", address, "--insecure", "--clients", ",".join(SITES),
        "--wait", 300, "--out", away, "--quiet",
    )  # fmt: skip
    sites = [
        start(site, "site", "--data", f"shards/{site}.csv", "--state", f"state/{site}", "--server", address,
              "--name", site, "--insecure", "--once")
        for site in SITES
    ]  # fmt: skip
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["run", "config.toml", "--out", str(here), "--quiet"])
    assert result.exit_code == 0, result.output
    for name, process in zip(("server", *SITES), (server, *sites), strict=True):
        assert process.wait(300) == 0, (folder / f"{name}.log").read_text()

    for sub in (Path(), Path("local")):
        mine, its = (json.loads((run / sub / "summary.json").read_text()) for run in (away, here))
        assert {k: v for k, v in mine.items() if k not in OTHER} == {k: v for k, v in its.items() if k not in OTHER}
        for client in SITES:
            assert without_sockets(mine["clients"][client]) == without_sockets(its["clients"][client])
        assert without_sockets(mine["bytes"]) == without_sockets(its["bytes"])
        for direction in ("up", "down"):
            assert mine["bytes"][f"{direction}_socket"] > mine["bytes"][f"{direction}_frame"]
            assert its["bytes"][f"{direction}_socket"] is None
        for found, expected in zip(rounds(away / sub), rounds(here / sub), strict=True):
            for key in ("index", "heard", "excluded", "validation", "best", "scores"):
                assert found[key] == expected[key], key
            for client in SITES:
                assert without_sockets(found["traffic"][client]) == without_sockets(expected["traffic"][client])
        states = sorted(path.relative_to(here) for path in (here / sub / "state").glob("round_*/server.bin"))
        assert states
        for path in states:
            assert (away / path).read_bytes() == (here / path).read_bytes()
    for site in SITES:
        [exported] = (folder / "state" / site).glob(f"*/{site}/ce-lora-seed-3/adapter/adapter_model.safetensors")
        assert exported.read_bytes() == (here / "adapters" / site / "adapter_model.safetensors").read_bytes()
        said = (folder / f"{site}.log").read_text()
        assert f"connected to {address}" in said and "the server has finished" in said
