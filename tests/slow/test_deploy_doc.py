"""docs/deploy.md, followed to the letter: its blocks are run in their order, by real processes on loopback.

A ```bash block whose first line is `# on <whom>` is run; `<whom>` is "the server", "site-a" or "each site, here
site-a", and may be followed by "left running" or "exit code N". Machines are folders, `scp` copies between them, and
server.example:8000 is localhost and a free port. Nothing else is changed but the number of rounds.
"""

import csv
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
from typer.main import get_command

from celora import cli
from celora.site import policy
from celora.site.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")]

ROOT = Path(__file__).parents[2]
DOCUMENT, EXAMPLES = ROOT / "docs" / "deploy.md", ROOT / "examples"
SITES = ("site-a", "site-b", "site-c")
MACHINES = {"the server": ("server",), "site-a": ("site-a",), "each site, here site-a": SITES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ON = re.compile(r"# on (the server|site-a|each site, here site-a)(?:, (left running)|, exit code (\d))?")
WORDS = {
    "cardiac": ("chest pain on exertion", "palpitations at night", "swollen ankles"),
    "respiratory": ("dry cough", "wheezing after cold air", "sore throat"),
    "skin": ("itching rash on both arms", "blister on the heel", "dry scaly patch"),
}
SCP = """#!/bin/sh
# scp [host:]from [host:]to, where hosts are folders of {root}
at() {{ case "$1" in *:*) echo "{root}/${{1%%:*}}/${{1#*:}}" ;; *) echo "$1" ;; esac; }}
exec cp "$(at "$1")" "$(at "$2")"
"""


@dataclass(frozen=True)
class Block:
    """Commands of the document: on which machines, whether they are left running, else how they end."""

    machines: tuple[str, ...]
    stays: bool
    code: int
    text: str


def blocks() -> Iterator[Block]:
    for language, text in BLOCK.findall(DOCUMENT.read_text()):
        first, _, rest = text.partition("\n")
        if language == "bash" and first.startswith("# on "):
            found = ON.fullmatch(first)
            assert found, f"{first!r}: expected {ON.pattern}"
            whom, stays, code = found.groups()
            yield Block(MACHINES[whom], stays is not None, int(code or 0), rest)


def files() -> dict[str, str]:
    """Name -> content of the files that the document shows."""
    shown = [text for language, text in BLOCK.findall(DOCUMENT.read_text()) if language == "toml"]
    return {text[2 : text.index(":")]: text for text in shown}


@dataclass
class Loopback:
    """Machines as folders; what was left running, and what each machine's commands said."""

    root: Path
    port: int
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    codes: dict[str, list[int]] = field(default_factory=dict)

    def shell(self, machine: str, text: str, log: Path) -> "subprocess.Popen[bytes]":
        mine = text.replace("site-a", machine) if machine in SITES else text
        mine = mine.replace("server.example:8000", f"localhost:{self.port}").replace(
            "0.0.0.0:8000", f"127.0.0.1:{self.port}"
        )
        mine = re.sub(r"server\.example(?!:)", "localhost", mine)  # not in scp server.example:…
        path = f"{self.root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        with open(log, "wb") as said:
            words = ["bash", "-euc", mine]
            return subprocess.Popen(words, cwd=self.root / machine, env=env, stdout=said, stderr=subprocess.STDOUT)

    def run(self, number: int, block: Block) -> None:
        """A block on all its machines at once; what is left running replaces what was left running there before."""
        begun = dict[str, subprocess.Popen[bytes]]()
        if block.stays:
            self.stop(*block.machines)
        for machine in block.machines:
            text = block.text
            if block.stays:  # the last command takes the shell's place, so that a signal reaches it
                *before, last = text.strip().replace("\\\n", " ").split("\n")
                text = "\n".join([*before, f"exec {last}"])
            begun[machine] = self.shell(machine, text, self.log(machine, number))
        if block.stays:
            self.running |= begun
            return
        for machine, process in begun.items():
            code = process.wait(300)
            assert code == block.code, f"{block.text} on {machine}: {code}\n{self.log(machine, number).read_text()}"

    def until(self, machine: str, words: str, log: Path) -> None:
        """Wait until what is left running has said this."""
        end = time.monotonic() + 120
        while words not in log.read_text():
            assert self.running[machine].poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    def said(self, machine: str) -> str:
        return "\n".join(log.read_text() for log in sorted(self.root.glob(f"*-{machine}.log")))

    def log(self, machine: str, number: int) -> Path:
        return self.root / f"{number:02d}-{machine}.log"

    def stop(self, *machines: str) -> None:
        ending = {machine: self.running.pop(machine) for machine in machines if machine in self.running}
        for process in ending.values():
            process.terminate()
        for machine, process in ending.items():
            self.codes.setdefault(machine, []).append(process.wait(60))


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for machine in ("server", *SITES, "bin"):
        (tmp_path / machine).mkdir()
    (tmp_path / "server.example").symlink_to("server")
    (tmp_path / "bin" / "scp").write_text(SCP.format(root=tmp_path))
    (tmp_path / "bin" / "scp").chmod(0o755)
    found = Loopback(tmp_path, port)
    try:
        yield found
    finally:
        for process in found.running.values():
            process.kill()
            process.wait()


def notes(path: Path, seed: str) -> None:
    """Rows of a site, as the document shows them."""
    draw = random.Random(seed)
    when, what = ("since Monday", "for two weeks", "worse at night"), ("no fever", "stable", "advised rest")
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["note", "diagnosis"])
        for number in range(75):
            label = list(WORDS)[number % 3]
            rows.writerow([f"{draw.choice(WORDS[label])}, {draw.choice(when)}, {draw.choice(what)}", label])


def test_the_files_it_shows_are_the_examples() -> None:
    shown = files()
    assert shown.keys() == {"federation.toml", "site-policy.toml", "site-policy-fedit.toml"}
    assert {name: (EXAMPLES / name).read_text() for name in shown} == shown
    ce_lora, fedit = (policy.read_policy(EXAMPLES / name) for name in ("site-policy.toml", "site-policy-fedit.toml"))
    assert ce_lora.leaves is not None and ce_lora.leaves["ce_lora.Up"] == ("core", "examples", "summary")
    assert fedit.leaves is not None and fedit.leaves["fedit.Up"] == ("weights", "examples")


def documented() -> Iterator[list[str]]:
    """Every command of celora in the document and in the units."""
    text = DOCUMENT.read_text()
    spans = re.findall(r"`(celora [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    lines = [
        line for kind, block in BLOCK.findall(text) if kind == "bash" for line in block.replace("\\\n", "").split("\n")
    ]
    units = "\n".join(path.read_text() for path in sorted((EXAMPLES / "systemd").iterdir()))
    for command in [*spans, *lines, *re.findall(r"/opt/celora/bin/(celora [^;'\n]*)", units)]:
        if command.startswith("celora "):
            yield shlex.split(command)[1:]


def test_every_command_and_option_it_names_exists() -> None:
    seen = set[str]()
    for words in documented():
        command, path = get_command(cli.app), list[str]()
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            path.append(words.pop(0))
            command = command.commands[path[-1]]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert [word for word in words if word.startswith("--") and word not in options] == [], f"celora {path} {words}"
        assert path or words[0].startswith("--"), f"celora {words}: no such command"
        seen.add(" ".join(path))
    assert seen >= {"server", "site", "site check", "site ledger", "keys site", "keys dev", "resume", "run", "list"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["celora-server.service", "celora-site.service"])
def test_systemd_has_nothing_against_the_units(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(
        (EXAMPLES / "systemd" / name).read_text().replace("/opt/celora/bin/celora", "/bin/true")
    )
    found = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


LOAD = """
import os, re, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1])
    print(tuple(logits.shape))
"""


def test_a_stranger_who_follows_it_ends_with_a_run(loopback: Loopback) -> None:
    root, served = loopback.root, -1
    for name, text in files().items():
        for machine in ("server",) if name == "federation.toml" else SITES:
            (root / machine / name).write_text(text.replace("rounds = 20\n", "rounds = 2\n"))
    for site in SITES:
        notes(root / site / "notes.csv", site)
    for number, block in enumerate(blocks()):
        loopback.run(number, block)
        if block.stays and block.machines == ("server",):
            served = number
            loopback.until("server", "listening on", loopback.log("server", served))
        elif block.stays and "server" in loopback.running:  # the sites have joined: the run goes to its end
            assert loopback.running["server"].wait(300) == 0, loopback.log("server", served).read_text()
            loopback.stop("server")
    loopback.stop(*SITES)
    assert loopback.codes == {"server": [0], "site-a": [0, 0], "site-b": [0, 0], "site-c": [0, 0]}

    for run in ("notes", "fedit"):
        summary = json.loads((root / "server/runs" / run / "summary.json").read_text())
        assert summary["clients"].keys() == set(SITES) and not summary["excluded"] and not summary["excluded_replies"]
    refusal = (
        "fedit.Up does not leave this site: its policy lets only ce_lora.Up, messages.Reply, remote.ClientFacts leave"
    )
    assert f"site-a: {refusal}" in loopback.said("server")
    said = loopback.said("site-a")
    assert "FAILED" not in said and "45 training, 15 validation, 15 test rows" in said  # the check
    assert "ce_lora.Up" in said and "the chain of lines is whole" in said  # the ledger
    for site in SITES:
        assert f"not sent: {refusal}" in loopback.said(site)
        ledger = Ledger(root / site / "state" / "ledger.jsonl")
        kinds = Counter(entry.kind for entry in ledger.entries())
        assert (kinds["ce_lora.Up"], kinds["fedit.Up"], kinds["local.Up"], kinds["error"]) == (2, 2, 4, 1)
        assert ledger.verify() == []
        written = {path.parent.name: path for path in (root / site / "state").glob(f"*/{site}/*/adapter")}
        assert written.keys() >= {"local-seed-0", "ce-lora-seed-0", "fedit-seed-0"}
        alike = root / "server/runs/rehearsal/adapters" / site
        for weights in ("adapter_model.safetensors", "head.safetensors"):
            assert (written["ce-lora-seed-0"] / weights).read_bytes() == (alike / weights).read_bytes()
    assert not (root / "server/runs/notes/adapters").exists()
    adapters = sorted(root.glob("site-*/state/*/*/[cf]*/adapter"))
    assert len(adapters) == 6
    loaded = subprocess.run([sys.executable, "-c", LOAD, *adapters], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines() == ["(2, 3)"] * 6
