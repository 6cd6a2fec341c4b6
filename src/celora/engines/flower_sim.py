"""Flower's simulation: nodes are processes of this machine (Ray), and `GridTransport` carries frames to them.

Only flwr's public API is used here (`celora.engines.flower_api`).
"""

import contextlib
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from celora.engines.flower_api import Context, Grid, Handler, ServerApp, answering_app, flower_log, frame_in, query
from celora.engines.transport import NodeId, Transport
from celora.errors import FederationError

LOOPBACK = ("127.0.0.1", "::1")


class GridTransport(Transport):
    """Requests as messages of Flower's Grid.

    Args:
        check: raises a FederationError once the simulation has ended.
    """

    def __init__(self, grid: Grid, check: Callable[[], None]) -> None:
        self.grid, self.check = grid, check

    def nodes(self) -> Mapping[NodeId, str]:
        """All nodes; none of them ever leaves."""
        self.check()
        return dict.fromkeys(self.grid.get_node_ids(), "")

    def send(self, node: NodeId, frame: bytes, seconds: float) -> str:
        """Send one message."""
        [name] = self.grid.push_messages([query(frame, node, seconds)])
        return str(name)

    def collect(self, requests: Sequence[str]) -> Mapping[str, bytes | str]:
        """The replies that have come."""
        found = self.grid.pull_messages(requests) if requests else []
        return {m.metadata.reply_to_message_id: m.error.reason or "" if m.has_error() else frame_in(m) for m in found}

    def forget(self, requests: Sequence[str]) -> None:
        """Nothing: the messages end with the simulation."""


@contextlib.contextmanager
def simulation(nodes: int, handler: Callable[[int], Handler], cpus: float, log: Path) -> Iterator[GridTransport]:
    """Flower's simulation, as long as the context lasts; Ray listens on the loopback interface only, and ends with it.

    Args:
        handler: position of a node -> what answers there; pickled, and called in Ray's processes.
        cpus: of this machine, for a node at work.
        log: a file for what Flower logs.

    Raises:
        FederationError: if it cannot be started, or ends by itself; the latter also where the transport is used.
    """
    import psutil  # noqa: PLC0415
    import ray  # noqa: PLC0415  # its import costs seconds
    from flwr.simulation import run_simulation  # noqa: PLC0415

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call,unused-ignore]
    if address not in LOOPBACK:
        raise FederationError(
            f"Ray would listen on {address}, expected this machine's loopback interface: import "
            "celora.engines.flower_sim before ray, and start no Ray in the same process"
        )
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: there are sockets in it
    grids: queue.Queue[Grid] = queue.Queue()
    failures: list[BaseException] = []
    over = threading.Event()
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator,unused-ignore]
    def main(grid: Grid, context: Context) -> None:
        grids.put(grid)
        over.wait()

    config: Any = {
        "client_resources": {"num_cpus": cpus, "num_gpus": 0.0},
        "init_args": {"log_to_driver": False, "logging_level": logging.ERROR, "_temp_dir": temporary},
    }
    app = answering_app(lambda context: handler(int(context.node_config["partition-id"])))

    def run() -> None:
        try:
            run_simulation(server, app, num_supernodes=nodes, backend_config=config)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="flower-simulation", daemon=True)

    def check() -> None:
        if not thread.is_alive():
            why = _first_cause(failures[0]) if failures else "no reason was given"
            raise FederationError(f"Flower's simulation has ended: {why}; see {log}")

    before = psutil.Process().children(recursive=True)
    with flower_log(log), _unchanged("PYTHONPATH"):  # Flower sets it, for Ray's processes
        thread.start()
        try:
            while grids.empty():
                check()
                time.sleep(0.05)
            transport = GridTransport(grids.get(), check)
            while len(transport.nodes()) < nodes:
                time.sleep(0.05)
            yield transport
        finally:
            started = [p for p in psutil.Process().children(recursive=True) if p not in before]
            over.set()
            thread.join()
            ray.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)
            psutil.wait_procs(started, timeout=60)  # Ray's shutdown does not wait for those that answered messages


def _first_cause(error: BaseException) -> BaseException:
    """The exception that an exception comes from in the end."""
    return _first_cause(error.__cause__) if error.__cause__ else error


@contextlib.contextmanager
def _unchanged(name: str) -> Iterator[None]:
    """Afterwards a variable of the environment is what it was before."""
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
