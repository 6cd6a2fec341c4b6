"""What it costs to have clients at sites: an empty round, bytes on the wire, memory; against a stock Flower deployment.

    python benchmarks/sites.py [--only transport,memory,simulated] [--rounds 12] [--tiny]

transport  three nodes over TLS with keys on loopback; a frame goes to each, as many bytes come back.
           Ours: Fleet and `run_node`. Stock: flower-superlink, flower-supernode, `flwr run` of benchmarks/flower-echo,
           one packed array a message. Bytes are counted by a TCP relay between each node and the server, the same for
           both: TCP payload, with TLS.
simulated  an empty round of Flower's simulation through `celora.engines.flower_sim.simulation`
memory     proportional set size (PSS) of each process: stock as above; ours in a real run of CE-LoRA on MiniLM

Results: a table, and benchmarks/results/sites.json.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from celora.engines.flower_server import Fleet
from celora.site.certificates import development, public_keys
from measure import Result, save, show

HERE = Path(__file__).parent
NODES = ("site-a", "site-b", "site-c")
CONTENTS = {"24 cores of 8×8": 24 * 8 * 8 * 4, "24 LoRA pairs, r = 8": 24 * 2 * 8 * 384 * 4}
"""Bytes of fp32 in one direction (MiniLM, d = 384)."""


class Relay:
    """A TCP relay on loopback that counts what it carries: `up` towards the server."""

    def __init__(self, target: int) -> None:
        self.target, self.up, self.down = target, 0, 0
        self.samples: list[tuple[float, int, int]] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        self._over = threading.Event()
        for work in (self._accept, self._sample):
            threading.Thread(target=work, daemon=True).start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                near, _ = self.listening.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                continue
            threading.Thread(target=self._carry, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, "down"), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                setattr(self, way, getattr(self, way) + len(data))
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def _sample(self) -> None:
        while not self._over.wait(0.02):
            self.samples.append((time.time(), self.up, self.down))

    def between(self, began: float, ended: float) -> tuple[int, int]:
        """Bytes up and down between two moments."""
        before = max((s for s in self.samples if s[0] <= began), default=(0.0, 0, 0))
        after = max((s for s in self.samples if s[0] <= ended), default=(0.0, 0, 0))
        return after[1] - before[1], after[2] - before[2]

    def close(self) -> None:
        self._over.set()
        self.listening.close()


@contextmanager
def processes(commands: Sequence[Sequence[str]], env: Mapping[str, str] | None = None) -> Iterator[list[int]]:
    """Run these as long as the context lasts; each with all it has started."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, env=env, start_new_session=True, **quiet))
        yield [process.pid for process in started]
    finally:
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, wanted)
            time.sleep(2 if wanted == signal.SIGTERM and any(p.poll() is None for p in started) else 0)
        for process in started:
            process.wait()


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += family(int(child))
    return found


def pss(pid: int) -> float:
    """Proportional set size of a process and its descendants, MB."""
    total = 0
    for one in family(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ours(folder: Path, size: int, rounds: int) -> Result:
    """Rounds of a frame of so many bytes, there and back."""
    keys = folder / "keys"
    development(keys, NODES, ["127.0.0.1"])
    began = time.perf_counter()
    tls = keys / "server.crt", keys / "server.key"
    with ExitStack() as stack:
        fleet = Fleet(("127.0.0.1", 0), tls, public_keys(keys / "sites"), {}, folder / "flower.log")
        transport = stack.enter_context(fleet)
        relays = [Relay(fleet.address[1]) for _ in NODES]
        command = [sys.executable, str(HERE / "echo_site.py")]
        sites = [[*command, f"127.0.0.1:{r.port}", str(keys / n)] for r, n in zip(relays, NODES, strict=True)]
        stack.enter_context(processes(sites))
        while len(nodes := transport.nodes()) < len(NODES):
            time.sleep(0.02)
        start, times = time.perf_counter() - began, []
        for _ in range(rounds):
            at, frame = time.time(), os.urandom(size)
            waiting = {transport.send(node, frame, 60) for node in nodes}
            while waiting:
                waiting -= transport.collect(list(waiting)).keys()
                time.sleep(0.02)
            times.append([at, time.time()])
        time.sleep(0.1)
        return {"start": start, **carried(relays, times, size)}


def stock(folder: Path, size: int, rounds: int) -> Result:
    """The same by Flower as it comes."""
    keys, port = folder / "keys", free_port()
    development(keys, NODES, ["127.0.0.1"])
    home, out = folder / "home", folder / "out.json"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "tls"\n[superlink.tls]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{keys / "ca.crt"}"\n'
    )
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }  # fmt: skip
    tools = Path(sys.executable).parent
    link = [
        str(tools / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth",
        "--ssl-ca-certfile", str(keys / "ca.crt"), "--ssl-certfile", str(keys / "server.crt"),
        "--ssl-keyfile", str(keys / "server.key"), "--database", str(folder / "state.db"),
    ]  # fmt: skip
    relays = [Relay(port) for _ in NODES]
    nodes = [
        [
            str(tools / "flower-supernode"), "--superlink", f"127.0.0.1:{relay.port}",
            "--root-certificates", str(keys / "ca.crt"),
            "--auth-supernode-private-key", str(keys / name / "site.key"), "--host", "127.0.0.1",
            "--port", str(free_port()),
        ]
        for relay, name in zip(relays, NODES, strict=True)
    ]  # fmt: skip
    began = time.perf_counter()
    with processes([link], env) as links:
        _until_open(port)
        for name in NODES:
            register = [str(tools / "flwr"), "supernode", "register", str(keys / "sites" / f"{name}.pub"), "tls"]
            subprocess.run(register, env=env, check=True, capture_output=True, timeout=60)
        with processes(nodes, env) as sites:
            time.sleep(5)
            shutil.copytree(HERE / "flower-echo", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
            config = f'rounds={rounds} bytes={size} nodes={len(NODES)} out="{out}"'
            run = [str(tools / "flwr"), "run", str(folder / "app"), "tls", "--run-config", config]
            subprocess.run(run, env=env, check=True, capture_output=True, timeout=120)
            idle = {"link": [pss(pid) for pid in links], "nodes": [pss(pid) for pid in sites]}
            deadline = time.monotonic() + 60 + 20 * rounds
            while not out.exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            times = json.loads(out.read_text())
            time.sleep(0.2)
            start = times[0][0] - time.time() + time.perf_counter() - began
    return {"start": start, "idle_mb": idle, **carried(relays, times, size)}


def _until_open(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nobody listens on port {port}")


def carried(relays: Sequence[Relay], times: Sequence[Sequence[float]], size: int) -> Result:
    """Seconds of a round, and bytes of one node in one round, without the first."""
    later = times[1:]
    began, ended = later[0][0], later[-1][1]
    ways = [relay.between(began, ended) for relay in relays]
    for relay in relays:
        relay.close()
    up, down = (sum(way[at] for way in ways) / len(ways) / len(later) for at in (0, 1))
    lengths = [end - start for start, end in later]
    return {
        "round": {"median": statistics.median(lengths), "least": min(lengths), "most": max(lengths)},
        "up": up, "down": down, "overhead_up": up - size, "overhead_down": down - size,
        "factor": (up + down) / (2 * size),
    }  # fmt: skip


def transport(rounds: int, tiny: bool) -> Result:
    found: Result = {}
    for name, size in CONTENTS.items():
        for whose, run, times in (("celora", ours, rounds), ("stock", stock, max(3, rounds // 3))):
            with tempfile.TemporaryDirectory(prefix="sites-") as folder:
                found[f"{name}, {whose}"] = run(Path(folder), size, times)
        if tiny:
            break
    rows = [
        {
            "content, whose": key,
            "start-up (s)": f"{r['start']:.1f}",
            "empty round (s)": f"{r['round']['median']:.2f} [{r['round']['least']:.2f}, {r['round']['most']:.2f}]",
            "up": f"{r['up']:,.0f}",
            "down": f"{r['down']:,.0f}",
            "factor": f"{r['factor']:.2f}",
        }
        for key, r in found.items()
    ]
    show("Rounds of three nodes, TLS and keys, loopback; bytes of one node in one round", rows)
    return found


def memory(rounds: int, tiny: bool) -> Result:
    """PSS of server and sites in a run of CE-LoRA on MiniLM, at its end."""
    from celora.data.docstrings import read_docstrings

    with tempfile.TemporaryDirectory(prefix="sites-") as name:
        folder = Path(name)
        table = read_docstrings()
        assert isinstance(table.inputs, list)
        for position, site in enumerate(NODES):
            rows = [{"text": t, "label": label} for t, label in zip(table.inputs, table.labels, strict=True)]
            text = "\n".join(json.dumps(row) for row in rows[position::3][:300])
            (folder / f"{site}.jsonl").write_text(text)
        (folder / "c.toml").write_text(
            'name = "memory"\n[data]\nsource = "*.jsonl"\nrows = 24\nmax_validation = 12\nmax_test = 12\n'
            '[plan]\nrounds = 30\n[algorithm]\nname = "ce-lora"\n'
        )
        keys, port = folder / "keys", free_port()
        development(keys, NODES, ["127.0.0.1"])
        celora = [sys.executable, "-m", "celora"]
        server = [*celora, "server", str(folder / "c.toml"), "--listen", f"127.0.0.1:{port}", "--keys", str(keys)]
        sites = [
            [*celora, "site", "--data", str(folder / f"{site}.jsonl"), "--state", str(folder / site),
             "--server", f"127.0.0.1:{port}", "--keys", str(keys / site)]
            for site in NODES
        ]  # fmt: skip
        out = folder / "run"
        with processes([[*server, "--out", str(out)], *sites]) as pids:
            journal, deadline = out / "events.jsonl", time.monotonic() + 300
            while time.monotonic() < deadline:
                time.sleep(0.3)
                if journal.exists() and '"index": 5' in journal.read_text():
                    break
            found = [pss(pid) for pid in pids]
            rounds_seen = [json.loads(line) for line in journal.read_text().splitlines()]
    seconds = [e["seconds"] for e in rounds_seen if e["event"] == "round"][1:]
    result = {"server": found[0], "sites": found[1:], "round_seconds": statistics.median(seconds)}
    row = {
        "server (MB)": f"{found[0]:.0f}",
        "a site (MB)": f"{statistics.mean(found[1:]):.0f}",
        "all four (MB)": f"{sum(found):.0f}",
        "round of CE-LoRA, 24 rows (s)": f"{result['round_seconds']:.2f}",
    }
    show("PSS in a run of CE-LoRA on MiniLM, torch and the backbone included", [row])
    return result


def simulated(rounds: int, tiny: bool) -> Result:
    """An empty round of `--engine flower-sim`, and PSS of what Ray starts."""
    from celora.engines.flower_sim import simulation
    from echo_site import echo

    with tempfile.TemporaryDirectory(prefix="sites-") as name:
        began = time.perf_counter()
        with simulation(len(NODES), echo, 1.0, Path(name) / "flower.log") as transport:
            start, times = time.perf_counter() - began, []
            for _ in range(rounds):
                at = time.perf_counter()
                waiting = {transport.send(node, os.urandom(6144), 60) for node in transport.nodes()}
                while waiting:
                    waiting -= transport.collect(list(waiting)).keys()
                    time.sleep(0.02)
                times.append(time.perf_counter() - at)
            start += times[0]  # Ray is still starting in the first round
            found = {"start": start, "round": statistics.median(times[1:]), "pss": pss(os.getpid())}
    row = {
        "start-up (s)": f"{found['start']:.1f}", "empty round (s)": f"{found['round']:.2f}",
        "this process and Ray's (MB)": f"{found['pss']:.0f}",
    }  # fmt: skip
    show("Flower's simulation, three nodes", [row])
    return found


SECTIONS = {"transport": transport, "memory": memory, "simulated": simulated}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="A,B,…")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="one content, few rounds: does it still run?")
    arguments = parser.parse_args()
    rounds = 3 if arguments.tiny else arguments.rounds
    found = {name: SECTIONS[name](rounds, arguments.tiny) for name in arguments.only.split(",")}
    if not arguments.tiny:
        print(save("sites", found, settings={"rounds": rounds}))


if __name__ == "__main__":
    main()
