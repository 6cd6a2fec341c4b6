"""A federation on this machine: sites that stay, and servers that come and go, each a process of its own, with TLS and
keys, through the command line; and what is read of it from outside: journals, ledgers, logs, who is in its turn."""

import csv
import ctypes
import json
import os
import signal
import socket
import subprocess  # real processes, really killed
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celora.core.messages import Checkpoint
from celora.data.docstrings import read_docstrings
from celora.wire import unpack

SITES = {"site-a": ("torch", "sympy"), "site-b": ("sympy", "rich"), "site-c": ("rich", "torch")}
"""Those that take part in every run, and the labels they have rows of."""
OTHERS = {
    "rogue": ("torch", "sympy"), "leaves": ("torch", "rich"), "budget": ("sympy", "torch"), "floor": ("rich", "torch"),
    "one-class": ("rich",), "empty": (), "full": ("torch", "rich"), "twice": ("torch", "rich"),
}  # fmt: skip
ROGUE = Path(__file__).with_name("rogue.py")
CONFIG = """
name = "sites"

[data]
source = "nowhere/*.csv"   # the sites say where their rows are
rows = 24
max_validation = 12
max_test = 12

[adapter]
layers = "last:1"

[train]
epochs = 2

[plan]
rounds = 3

[algorithm]
name = "ce-lora"
"""


def celora(*words: object) -> list[str]:
    """The command line, as an operator gives it."""
    return [sys.executable, "-m", "celora", *map(str, words)]


def heed() -> None:
    """Heed Ctrl-C, whatever a shell has told the tests, and end when the tests are killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def until(happened: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Wait for it.

    Raises:
        AssertionError: if it does not happen in time.
    """
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what()}"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@dataclass
class Started:
    """A process and what it says."""

    process: "subprocess.Popen[bytes]"
    log: Path
    heard: int = 0

    def text(self) -> str:
        """What it has said since `from_now_on`, or ever."""
        return self.log.read_text()[self.heard :]

    def from_now_on(self) -> None:
        self.heard = len(self.log.read_text())

    def running(self) -> bool:
        return self.process.poll() is None

    def says(self, words: str, seconds: float = 60) -> None:
        """Wait until it has said so."""
        until(lambda: words in self.text() or not self.running(), seconds, lambda: f"{words!r} in {self.text()}")
        assert words in self.text(), self.text()

    def send(self, number: int) -> None:
        assert self.running(), self.text()
        self.process.send_signal(number)

    def ends(self, seconds: float = 60) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s: {self.text()}") from None

    def kill(self) -> None:
        """kill -9, whatever state it is in."""
        self.process.kill()
        self.process.wait()


@dataclass
class Federation:
    """Keys, shards, and sites that stay from one run to the next.

    Args:
        root: where everything of it goes.
    """

    root: Path
    port: int = field(default_factory=free_port)
    sites: dict[str, Started] = field(default_factory=dict)
    started: list[Started] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    def shard(self, name: str) -> Path:
        return self.root / f"{name}.csv"

    def state(self, name: str) -> Path:
        return self.root / "state" / name

    def start(self, name: str, command: Sequence[str]) -> Started:
        """Start a process; it ends with the federation, at the latest."""
        log = self.root / f"{len(self.started):02}-{name}.log"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=self.root, env=env, preexec_fn=heed  # noqa: PLW1509
            )  # fmt: skip
        self.started.append(Started(process, log))
        return self.started[-1]

    def site(self, name: str, *words: object, program: Sequence[str] = ()) -> Started:
        """A site, of its own keys and rows; of an option that `words` repeats, the last counts."""
        given = ("--data", self.shard(name), "--state", self.state(name), "--server", self.address)
        command = celora("site", *given, "--keys", self.keys / name, *words)
        self.sites[name] = self.start(name, [sys.executable, *program, *command[3:]] if program else command)
        return self.sites[name]

    def rogue(self, faults: Mapping[int, str]) -> None:
        """A site that does something wrong in these rounds (tests/slow/rogue.py); called again, something else."""
        plan = self.root / "faults.json"
        plan.write_text(json.dumps({str(round): fault for round, fault in faults.items()}))
        if "rogue" not in self.sites:
            self.site("rogue", program=(str(ROGUE), str(plan)))

    def without(self, *names: str) -> None:
        """These sites are gone."""
        for name in names:
            self.sites.pop(name).kill()

    def run(self, name: str, *words: object, more: Sequence[str] = ()) -> "Run":
        """Start a server for the sites that stay, and for some more; of sites that have ended, new ones."""
        for gone in [site for site, it in self.sites.items() if not it.running()]:
            del self.sites[gone]
        for site in [*SITES, *more]:
            if site not in self.sites:
                self.site(site)
            self.sites[site].from_now_on()
        run = Run(self, self.root / name)
        clients = ",".join([*SITES, *more])
        listen = ("--listen", self.address, "--keys", self.keys, "--clients", clients, "--out", run.out)
        run.server = self.start(f"server-{name}", celora("server", self.root / "config.toml", *listen, *words))
        return run


@contextmanager
def federation(root: Path) -> Iterator[Federation]:
    """Keys and shards are made; whatever has been started is ended."""
    made = Federation(root)
    (root / "config.toml").write_text(CONFIG)
    table, rows = read_docstrings(), dict[str, list[str]]()
    for text, label in zip(table.inputs, table.labels, strict=True):
        rows.setdefault(str(label), []).append(str(text))
    for position, (name, labels) in enumerate({**SITES, **OTHERS}.items()):
        count = 48 // max(1, len(labels))
        shard = [(text, label) for label in labels for text in rows[label][24 * position :][:count]]
        with open(made.shard(name), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *shard])
    try:
        keys = made.start("keys", celora("keys", "dev", "--out", made.keys, "--sites", ",".join([*SITES, *OTHERS])))
        assert keys.ends() == 0, keys.text()
        yield made
    finally:
        for one in made.started:
            one.kill()


@dataclass
class Run:
    """A run of a server, seen from outside; events and rounds are those of its own algorithm, not of its twin."""

    fed: Federation
    out: Path
    server: Started = field(init=False)

    def resume(self) -> None:
        self.server = self.fed.start(f"resume-{self.out.name}", celora("resume", self.out))

    def ends(self, seconds: float = 120) -> int:
        """The server's exit code."""
        code = self.server.ends(seconds)
        if code:
            logs = [f"--- {name}\n{site.text()[-3000:]}" for name, site in self.fed.sites.items()]
            print("\n".join(["--- server", self.server.text()[-3000:], *logs]))
        return code

    def events(self, kind: str = "round") -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if event["event"] == kind]

    def round(self, index: int) -> dict[str, Any]:
        return next(event for event in self.events() if event["index"] == index)

    def after(self, round: int, seconds: float = 90) -> None:
        """Wait until so many rounds are over."""
        until(
            lambda: len(self.events()) >= round or not self.server.running(),
            seconds,
            lambda: f"round {round} of {self.out.name}: {self.server.text()[-3000:]}",
        )
        assert len(self.events()) >= round, self.server.text()

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return found

    def excluded(self) -> dict[int, dict[str, str]]:
        """Round -> client -> why its reply was not used, in summary.json."""
        return {int(index): why for index, why in self.summary()["excluded_replies"].items()}

    @property
    def name(self) -> str:
        """The federation's name at its sites."""
        return str(json.loads((self.out / "session.json").read_text())["federation"])

    def kept(self, site: str, algorithm: str = "ce-lora") -> Path:
        """Where a site keeps what belongs to the run."""
        return self.fed.state(site) / self.name / site / f"{algorithm}-seed-0"

    def left(self, site: str, round: int) -> list[dict[str, Any]]:
        """What left a site in a round, as its ledger says."""
        path = self.fed.state(site) / "ledger.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        own = {"federation": self.name, "job": "ce-lora-seed-0", "round": round}
        return [line for line in lines if own.items() <= line.items()]

    def in_turn(self, site: str) -> bool:
        """Whether a site is in the middle of a turn: it holds its store, as the kernel's list of locks says."""
        lock = self.kept(site) / "store" / ".lock"
        if not lock.exists():
            return False
        inode = f":{lock.stat().st_ino} "
        return any(inode in line for line in Path("/proc/locks").read_text().splitlines())

    def catch(self, site: str, round: int) -> None:
        """Wait until a site is in the middle of its turn of a round, of which nothing has left yet."""
        until((self.out / "session.json").exists, 60, self.server.text)
        self.after(round - 1)
        until(lambda: self.in_turn(site), 60, lambda: f"{site} in round {round}: {self.fed.sites[site].text()}")
        assert len(self.events()) == round - 1 and not self.left(site, round), "its turn was over too soon"

    def numbers(self) -> dict[str, Any]:
        """All that the run comes to, and nothing of how long it took or what the sockets carried."""
        found: dict[str, Any] = {}
        for twin in ("local", ""):
            folder = self.out / twin
            summary = json.loads((folder / "summary.json").read_text())
            bare = ("seconds", "peak_rss_mb", "folder", "adapters", "notices", "settings")
            found |= {f"{twin} {key}": _bare(value) for key, value in summary.items() if key not in bare}
            events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
            rounds = [event for event in events if event["event"] == "round"]
            found |= {
                f"{twin} round {e['index']} {k}": _bare(v) for e in rounds for k, v in e.items() if k not in TIMES
            }
        for pattern in ("state/round_*/server.bin", "similarity/*"):
            found |= {str(p.relative_to(self.out)): p.read_bytes() for p in self.out.glob(pattern)}
        for site in SITES:
            for algorithm in ("local", "ce-lora"):
                kept = self.kept(site, algorithm)
                for path in kept.glob("adapter/*.safetensors"):
                    found[f"{site} {path.relative_to(kept.parent)}"] = path.read_bytes()
        return found

    def state(self, round: int) -> bytes:
        """The server's state after a round, of the last two."""
        return unpack(Checkpoint, (self.out / f"state/round_{round:04}/server.bin").read_bytes()).server


TIMES = ("time", "seconds")


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if "socket" not in key}
    return value


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Which numbers of two runs are not equal, by name: a message that can be read."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name, "-") != other.get(name, "-"))
