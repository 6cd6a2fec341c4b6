"""kill -9 at random moments: whatever a process is doing, resuming ends with the numbers of an undisturbed run."""

import json
import random
import signal
import subprocess  # real processes, really killed
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_runs import CONFIG

pytestmark = pytest.mark.slow

LONGER = CONFIG.replace("rounds = 2", "rounds = 8\nfraction = 0.75\nevaluate_every = 2")


def start(log: Path, *words: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "celora", *map(str, words), "--quiet"]
    with open(log, "wb") as stderr:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, preexec_fn=_heed_ctrl_c)  # noqa: PLW1509


def _heed_ctrl_c() -> None:
    """A shell that runs the tests in the background would have them, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def numbers(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {
        key: summary[key] for key in ("moment", "round", "metrics", "moments", "last", "clients", "bytes", "notices")
    }


def resumed(log: Path, torn: Path, *words: object) -> "subprocess.Popen[bytes]":
    again = ("resume", torn) if (torn / "session.json").exists() else ("run", *words, "--out", torn)
    return start(log, *again)


def journal(folder: Path, kind: str) -> int:
    """How often an event stands in the journals of a run and its twin."""
    files = [folder / "events.jsonl", folder / "local" / "events.jsonl"]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return sum(f'"event": "{kind}"' in line for line in lines)


def wait_for_progress(process: "subprocess.Popen[bytes]", folder: Path, draw: random.Random) -> None:
    """Until some rounds more are in the journal, and then a moment longer, or until the process is done."""
    target = journal(folder, "round") + draw.randrange(4)
    while process.poll() is None and journal(folder, "round") < target:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.4))


@pytest.mark.parametrize("algorithm", ["ce-lora"])  # contracts resume every other one
def test_killed_again_and_again_a_run_ends_with_the_same_numbers(algorithm: str, tmp_path: Path) -> None:
    config = tmp_path / "digits.toml"
    config.write_text(LONGER)
    choose = f"--set=algorithm.name={algorithm}"
    log = tmp_path / "stderr.txt"
    assert start(log, "run", config, choose, "--out", tmp_path / "whole").wait(300) == 0, log.read_text()
    draw, torn = random.Random(algorithm), tmp_path / "torn"
    for _ in range(6):  # somewhere in the start, in a round, in a checkpoint, in the journal, in the end
        process = resumed(log, torn, config, choose)
        wait_for_progress(process, torn, draw)
        process.kill()  # does nothing to a process that is already done
        process.wait()
        if (torn / "summary.json").exists():
            break
    assert resumed(log, torn, config, choose).wait(300) == 0, log.read_text()
    assert journal(torn, "start") > 2, "the run was never caught in the act"
    assert numbers(torn) == numbers(tmp_path / "whole")
    assert numbers(torn / "local") == numbers(tmp_path / "whole" / "local")
    assert (torn / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert (torn / "bytes.csv").read_text() == (tmp_path / "whole" / "bytes.csv").read_text()


def test_after_ctrl_c_the_run_says_how_to_go_on_and_goes_on(tmp_path: Path) -> None:
    config, out = tmp_path / "digits.toml", tmp_path / "run"
    config.write_text(CONFIG.replace("rounds = 2", "rounds = 200"))
    log = tmp_path / "stderr.txt"
    process = start(log, "run", config, "--out", out)
    while not list(out.glob("**/state/round_*")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 4
    assert f"celora resume {out}" in log.read_text()
    before = len((out / "local" / "events.jsonl").read_text().splitlines())
    process = start(log, "resume", out)
    while len((out / "local" / "events.jsonl").read_text().splitlines()) < before + 3:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 4
    lines = (out / "local" / "events.jsonl").read_text().splitlines()
    rounds = [event["index"] for event in map(json.loads, lines) if event["event"] == "round"]
    assert rounds == list(range(1, len(rounds) + 1)) and len(rounds) > 1
