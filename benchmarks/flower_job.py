"""The same federated job in Flower's simulation: its inputs written from a celora world, `flwr run`, its report.

The app is benchmarks/flower-fedavg-lora. Ray listens on all interfaces, so the job runs in a network namespace of its
own where the machine allows it. `flwr run` leaves a SuperLink running: every process that carries this job's own
FLWR_HOME is ended afterwards, by its id.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from celora.experiment.population import Population
from celora.models.loading import embedded
from celora.tasks.classify import Classify

APP = Path(__file__).parent / "flower-fedavg-lora"
LIMIT = 3600


def missing() -> str | None:
    """Why Flower's simulation cannot run here, or None."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        return "flwr or ray is not installed (pip install 'celora[flower]')"
    if not (Path(sys.executable).parent / "flwr").exists():
        return f"found no command flwr beside {sys.executable}"
    return None


def write_inputs(population: Population, folder: Path) -> None:
    """The clients' training texts and labels, and LoRA and head to start from, under PEFT's names."""
    table, task = population.federation.table, population.task
    assert isinstance(task, Classify)
    assert task.classes
    classes = task.classes
    shares = population.federation.clients.values()
    clients = [
        {
            "texts": [table.inputs[row] for row in share.train],
            "labels": [classes.index(table.labels[row]) for row in share.train],
            "validation_texts": [table.inputs[row] for row in share.validation],
            "validation_labels": [classes.index(table.labels[row]) for row in share.validation],
        }
        for share in shares
    ]
    (folder / "data.json").write_text(json.dumps({"classes": len(classes), "clients": clients}))
    names = {".A": ".lora_A.weight", ".B": ".lora_B.weight"}
    initial: dict[str, torch.Tensor] = {}
    for name, weight in population.initial.items():
        module = name[:-2]
        peft = name if name.startswith("head.") else f"encoder.{module}{names[name[-2:]]}"
        initial[f"base_model.model.{peft}"] = weight.contiguous()
    save_file(initial, folder / "initial.safetensors")


def run(population: Population, cores: int, each: int) -> dict[str, Any]:
    """The job of this world's experiment: FedAvg over its clients, `cores` in all and `each` for a client.

    Returns:
        `seconds` of the whole command; `rounds`: seconds of each; `clients`: by round, what each client reported.

    Raises:
        RuntimeError: with the end of the log, if the run did not complete.
    """
    experiment = population.experiment
    with tempfile.TemporaryDirectory(prefix="fl-") as name:  # short: Ray puts sockets into it
        folder = Path(name)
        write_inputs(population, folder)
        config = {
            "num-server-rounds": experiment.plan.rounds,
            "local-epochs": experiment.train.epochs,
            "batch-size": experiment.train.batch_size,
            "learning-rate": experiment.train.lr,
            "clip": experiment.train.clip,
            "rank": experiment.adapter.rank,
            "alpha": experiment.adapter.lora_alpha,
            "max-length": experiment.model.max_length,
            "seed": experiment.plan.seed,
            "model-name": str(embedded()),
            "data": str(folder / "data.json"),
            "initial": str(folder / "initial.safetensors"),
        }
        return run_app(APP, folder, config, nodes=len(population.clients), cores=cores, each=each)


def run_app(app: Path, folder: Path, config: dict[str, Any], *, nodes: int, cores: int, each: int) -> dict[str, Any]:
    """`flwr run` of an app, which writes its report to the file `out` of its configuration.

    Args:
        folder: with its inputs; short, as Ray puts sockets into it.
        cores: in all, `each` for a node.

    Returns:
        `seconds` of the whole command, and the report.

    Raises:
        RuntimeError: with the end of the log, if the run did not complete.
    """
    shutil.copytree(app, folder / app.name, ignore=shutil.ignore_patterns("__pycache__"))
    config |= {"out": str(folder / "out.json")}
    federation = (
        f"num-supernodes={nodes} client-resources-num-cpus={each} client-resources-num-gpus=0.0 "
        f"init-args-num-cpus={cores}"
    )
    command = [
        str(Path(sys.executable).parent / "flwr"), "run", str(folder / app.name), "local", "--stream",
        "--federation-config", federation, "--run-config", " ".join(f"{k}={_toml(v)}" for k, v in config.items()),
    ]  # fmt: skip
    home = folder / "home"
    try:
        began = time.perf_counter()
        log = _within_own_network(command, home, each)
        seconds = time.perf_counter() - began
    finally:
        _end(home)
    if not (folder / "out.json").exists():
        raise RuntimeError("Flower's run did not complete; the end of its log:\n" + log[-4000:])
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return {"seconds": seconds, **found}


def _toml(value: object) -> str:
    return json.dumps(value)


def _within_own_network(command: list[str], home: Path, threads: int) -> str:
    """Run the command, in a network namespace with nothing but loopback if there may be one; what it printed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # flwr starts its parts by name
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_TMPDIR": str(home.parent),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    for unshare in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        up = [*unshare, "sh", "-c", "ip link set lo up"]
        if shutil.which("unshare") and subprocess.run(up, capture_output=True, check=False).returncode == 0:
            command = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "flwr", *command]
            break
    else:
        print("no network namespace here: Ray will listen on all interfaces while this runs", file=sys.stderr)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False, cwd=home.parent
    )
    return done.stdout + done.stderr


def _end(home: Path) -> None:
    """End the processes of this job: those whose environment names its FLWR_HOME."""
    mark = f"FLWR_HOME={home}".encode()
    for wanted, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        for process in _carrying(mark):
            _signal(process, wanted)
        while _carrying(mark) and time.monotonic() < deadline:
            time.sleep(0.2)


def _carrying(mark: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def _signal(process: int, wanted: signal.Signals) -> None:
    try:
        os.kill(process, wanted)
    except ProcessLookupError:
        return
