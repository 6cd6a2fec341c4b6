"""Flower's simulation gives what the embedded engine gives, bit for bit, for every algorithm in the table.

The sites are real ones (`celora.site.site.Site`) in Ray's processes, on the toy population; `JobStart.label` names the
variant.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from celora.algorithms import ALGORITHMS
from celora.core import rounds
from celora.core.messages import Round
from celora.engines.remote import JobStart
from celora.engines.remote_exchange import Remote
from celora.errors import FederationError
from celora.site.policy import Policy
from celora.site.site import Site, job_folder
from celora.site.store import SiteStore
from celora.testing.federation import PLAN, Run, bits
from celora.wire import Schema
from tests.contract.test_algorithms import VARIANTS
from tests.contract.test_channel import BOTH, CHANNELS, filtered
from tests.toy import CLIENTS, JobContext, population_of

pytest.importorskip("flwr")
from celora.engines.flower_sim import GridTransport, simulation

pytest.importorskip("ray")

DEFAULT = {name: next(v for v in VARIANTS if VARIANTS[v].algorithm == kind()) for name, kind in ALGORITHMS.items()}
"""Algorithm -> its variant with default settings."""
OTHERS = [name for name in VARIANTS if name not in DEFAULT.values()]
CPUS = float(max(1, (os.cpu_count() or 2) // 2))
"""Of this machine, for a client at work: two processes share the clients."""
SECONDS = 300.0
"""Longer than Ray takes to start its processes on a machine that does other things too."""
Handle = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Places:
    """Position -> the site there, made anew in each of Ray's processes; who is asked, is written down."""

    root: Path

    def __call__(self, position: int) -> Handle:
        site = _site(self.root, CLIENTS[position])

        def handle(frame: bytes) -> bytes:
            with open(self.root / f"{site.client}.pids", "a") as file:
                file.write(f"{os.getpid()}\n")
            return site(frame)

        return handle


@cache
def _site(root: Path, client: str) -> Site:
    def enter(begin: JobStart) -> JobContext:
        variant, _, channel = begin.label.partition(" + ")
        algorithm = VARIANTS[variant].algorithm
        return JobContext(algorithm, population_of(algorithm), client, CHANNELS[channel] if channel else ())

    return Site(client, root / client, Policy(floor=1), enter, None)


@dataclass(frozen=True)
class Simulated:
    """A variant's run: its rounds, the stores on disk after each, the test scores of kept models, exported files."""

    rounds: tuple[Round, ...]
    stores: tuple[dict[str, dict[str, bytes]], ...]
    tests: Mapping[str, Any]
    problems: Mapping[str, str]
    exported: Mapping[str, bool]


def simulated(remote: Remote, root: Path, name: str, channel: str = "") -> Simulated:
    algorithm, job = VARIANTS[name].algorithm, f"toy/{name}{'-filtered' if channel else ''}"
    initial, stages = population_of(algorithm).initial, CHANNELS[channel] if channel else ()
    label = f"{name} + {channel}" if channel else name
    remote.start_job(job, JobStart("", label, "backbone", b"no, yes", CLIENTS), CLIENTS, SECONDS)
    folders = {client: root / client / job_folder(client, job) for client in CLIENTS}

    def stores() -> dict[str, dict[str, bytes]]:
        found = {}
        for client, folder in folders.items():
            with SiteStore(folder / "store", Schema.of(initial)) as store:
                found[client] = {kept: store[kept] for kept in store}
        return found

    pairs = [(rnd, stores()) for rnd in rounds.run_rounds(algorithm, remote, PLAN, CLIENTS, initial, channel=stages)]
    best = pairs[-1][0].checkpoint.best["personal"]
    kept = f"personal@{best.round}"
    return Simulated(
        tuple(rnd for rnd, _ in pairs),
        tuple(stores for _, stores in pairs),
        rounds.score_on_test(remote, PLAN, CLIENTS, [kept]),
        remote.export(CLIENTS, kept, SECONDS),
        {client: (folder / "adapter" / "adapter.safetensors").exists() for client, folder in folders.items()},
    )


def tree() -> list[psutil.Process]:
    """This process and all that come from it."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def listening(processes: Iterable[psutil.Process]) -> dict[str, str]:
    """Address on which one of these processes listens -> its name."""
    return {
        f"{connection.laddr.ip} {connection.laddr.port}": process.name()
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@dataclass(frozen=True)
class Session:
    """All runs of one simulation; while it ran, who listened where; and what was left of it."""

    root: Path
    runs: Mapping[str, Simulated]
    filtered: Simulated
    listening: Mapping[str, str]
    left: tuple[str, ...]


@contextmanager
def started(root: Path, cpus: float = CPUS) -> Iterator[GridTransport]:
    """A simulation of the four clients. Ray leaves it to the garbage collector to close files: not our matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with simulation(len(CLIENTS), Places(root), cpus, root / "flower.log") as transport:
                yield transport
        finally:
            gc.collect()


def session(root: Path, names: Iterable[str]) -> Session:
    before = tree()
    with started(root) as transport:
        remote = Remote(transport)
        runs = {name: simulated(remote, root, name) for name in names}
        with_filters = simulated(remote, root, DEFAULT["fedit"], BOTH)
        here = tree()
        found = listening(here)
    return Session(root, runs, with_filters, found, left(here, before))


def left(processes: Iterable[psutil.Process], before: Iterable[psutil.Process]) -> tuple[str, ...]:
    """The names of processes that are still there, but for those that were there before."""
    there = [p for p in processes if p not in before and p.is_running()]
    return tuple(p.name() for p in there if p.status() != psutil.STATUS_ZOMBIE)


def same(found: Simulated, expected: Run) -> None:
    assert len(found.rounds) == len(expected.rounds) == PLAN.rounds + 1
    for mine, its in zip(found.rounds, expected.rounds, strict=True):
        assert mine.heard == (CLIENTS if mine.index <= PLAN.rounds else ()) and not mine.excluded
        assert bits(mine) == bits(its)
    for mine, its in zip(found.stores, expected.stores, strict=True):
        assert mine == {client: its.get(client, {}) for client in CLIENTS}
    [kept] = {kept for tests in found.tests.values() for kept in tests}
    assert found.tests == rounds.score_on_test(expected.federation.engine, PLAN, CLIENTS, [kept])
    assert found.problems == {} and all(found.exported.values())


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return session(tmp_path_factory.mktemp("defaults"), DEFAULT.values())


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return session(tmp_path_factory.mktemp("others"), OTHERS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_flowers_simulation_equals_the_embedded_run_bit_for_bit(algorithm: str, defaults: Session) -> None:
    """Server state, scores, bytes and checkpoint of every round; private state on disk; test scores of kept models."""
    same(defaults.runs[DEFAULT[algorithm]], VARIANTS[DEFAULT[algorithm]].reference)


def test_flowers_simulation_equals_the_embedded_run_with_filters(defaults: Session) -> None:
    """Residuals and notes, which lie beside the private state, included."""
    same(defaults.filtered, filtered("fedit", BOTH))
    assert "channel@2" in defaults.filtered.stores[-1]["c0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_flowers_simulation_equals_the_embedded_run_under_other_settings(name: str, others: Session) -> None:
    same(others.runs[name], VARIANTS[name].reference)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: one process plays all clients")
def test_one_client_was_played_by_two_processes_so_its_state_went_through_the_disk(defaults: Session) -> None:
    played = [set((defaults.root / f"{client}.pids").read_text().split()) for client in CLIENTS]
    assert max(map(len, played)) > 1


def test_nothing_listens_on_anything_but_loopback(defaults: Session) -> None:
    assert len(defaults.listening) > 3 and any("gcs" in name for name in defaults.listening.values())
    addresses = {address.split()[0].removeprefix("::ffff:") for address in defaults.listening}
    assert addresses <= {"127.0.0.1", "::1"}


def test_no_process_is_left_after_a_simulation(defaults: Session) -> None:
    assert defaults.left == ()


class Broken(Exception):
    """What goes wrong here."""


def test_a_second_simulation_in_the_same_process_works_and_an_exception_ends_it(
    defaults: Session, tmp_path: Path
) -> None:
    name, before, here = DEFAULT["fedit"], tree(), list[psutil.Process]()
    path = os.environ.get("PYTHONPATH")

    def breaks(transport: GridTransport) -> None:
        same(simulated(Remote(transport), tmp_path, name), VARIANTS[name].reference)
        here.extend(tree())
        raise Broken

    with pytest.raises(Broken), started(tmp_path, float(os.cpu_count() or 1)) as transport:  # one process is enough
        breaks(transport)
    assert len(here) > len(before) and left(here, before) == ()
    assert os.environ.get("PYTHONPATH") == path


def test_a_simulation_that_cannot_start_says_why_and_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    def fails(self: object, config: object) -> Iterator[None]:
        raise OSError("no room in /dev/shm")

    monkeypatch.setattr(RayBackend, "__init__", fails)
    with (
        pytest.raises(FederationError, match=r"simulation has ended: no room in /dev/shm; see .*log"),
        started(tmp_path) as transport,
    ):
        Remote(transport).start_job("toy/any", JobStart("", "any", "", b"", ()), CLIENTS, SECONDS)
    assert "no room in /dev/shm" in (tmp_path / "flower.log").read_text()


def test_ray_that_would_listen_elsewhere_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.7")
    with (
        pytest.raises(
            FederationError, match=r"Ray would listen on 192\.0\.2\.7.*import celora\.engines\.flower_sim before"
        ),
        started(tmp_path),
    ):
        pytest.fail("it was started")
