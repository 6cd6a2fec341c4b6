"""The server's work for many clients, against the plain double loop, in one run.

    python benchmarks/server.py [--out FILE] [--quick] [--threads 2]

Clients are synthetic: 20 domains that share 10 classes; each client has its own shares of classes, its own rows'
noise and, in the aggregations, 2 to 10 classes of 1 to 3 components. The double loop is written in the obvious way and
timed on the first few clients; its seconds for all are that time times the ratio of pairs. It is compared by seconds of
CPU, all cores together, which other users of the machine change least. Differences are the largest
relative ones over those pairs. Each aggregation runs in a process of its own, whose peak memory includes the clients'
messages. Prints a table and writes benchmarks/results/server.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ot
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from celora.algorithms.ce_lora import CELoRA, Server, Up
from celora.core.aggregation import Heard
from celora.maths.cka import cka
from celora.maths.distances import distance_matrix, pair_distances
from celora.maths.mixtures import Mixture
from celora.maths.weights import combine, kernel
from celora.wire import pack
from job import peak_mb

DOMAINS, CLASSES, COMPONENTS, DIM, LAYERS, RANK = 20, 10, 3, 384, 24, 8
Row = dict[str, Any]


# --- clients ------------------------------------------------------------------------------------------------------


def mixtures(count: int, *, ragged: bool, seed: int = 0) -> list[Mixture]:
    """Client i is of domain i modulo 20; `ragged`: of 2 to 10 classes of 1 to 3 components, else of 10 of 3."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    centres = normal(CLASSES, DIM) + 0.7 * normal(DOMAINS, CLASSES, DIM)
    widths = 0.5 + 0.5 * torch.rand(CLASSES, DIM, generator=draw)
    made = []
    for client in range(count):
        held = torch.randperm(CLASSES, generator=draw)[: between(2, CLASSES) if ragged else CLASSES].sort().values
        sizes = torch.tensor([between(1, COMPONENTS) if ragged else COMPONENTS for _ in held])
        labels = held.repeat_interleave(sizes)
        shares = (0.05 + torch.empty(len(held)).exponential_(generator=draw)).repeat_interleave(sizes)
        masses = shares * (0.2 + torch.rand(len(labels), generator=draw))
        means = centres[client % DOMAINS, labels] + 0.15 * normal(len(held), DIM).repeat_interleave(sizes, dim=0)
        means += 0.35 * normal(len(labels), DIM)
        spreads = widths[labels] * (0.9 + 0.2 * torch.rand(len(labels), DIM, generator=draw))
        made.append(Mixture(labels.int(), masses / masses.sum(), means, spreads))
    return made


def cores(count: int, seed: int = 1) -> Tensor:
    """(m, layers, r, r): the identity, moved in part as the client's domain moves it."""
    draw = torch.Generator().manual_seed(seed)
    domains = torch.randn(DOMAINS, LAYERS, RANK, RANK, generator=draw)
    own = torch.randn(count, LAYERS, RANK, RANK, generator=draw)
    return torch.eye(RANK) + 0.05 * (domains[torch.arange(count) % DOMAINS] + own)


# --- the plain double loop ----------------------------------------------------------------------------------------


def loop_cka(all_cores: Tensor) -> np.ndarray[Any, Any]:
    m = len(all_cores)
    examples = all_cores.double().mT.numpy()
    out = np.eye(m)
    for i in range(m):
        for j in range(i + 1, m):
            layers = []
            for one, other in zip(examples[i], examples[j], strict=True):
                x, y = one - one.mean(0), other - other.mean(0)
                layers.append(np.sum((y.T @ x) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))
            out[i, j] = out[j, i] = np.mean(layers)
    return out


def loop_distance(p: Mixture, q: Mixture) -> float:
    x, y = (np.concatenate([side.means.numpy(), side.spreads.numpy()], axis=1).astype(np.float64) for side in (p, q))
    a, b = (side.masses.numpy().astype(np.float64) for side in (p, q))
    a, b = a / a.sum(), b / b.sum()
    rows, columns = p.labels.numpy(), q.labels.numpy()
    squares = ot.dist(x, y)
    cost = squares.copy()
    for c in np.unique(rows):
        for d in np.unique(columns):
            mine, other = np.flatnonzero(rows == c), np.flatnonzero(columns == d)
            block = np.ix_(mine, other)
            cost[block] += ot.emd2(a[mine] / a[mine].sum(), b[other] / b[other].sum(), squares[block])
    return float(np.sqrt(ot.emd2(a, b, cost)))


def loop_distances(clients: Sequence[Mixture]) -> np.ndarray[Any, Any]:
    m = len(clients)
    out = np.zeros((m, m))
    for i in range(m):
        for j in range(i + 1, m):
            out[i, j] = out[j, i] = loop_distance(clients[i], clients[j])
    return out


def loop_average(weights: Tensor, all_cores: Tensor) -> Tensor:
    out = []
    for row in weights:
        mean = torch.zeros(all_cores.shape[1:], dtype=torch.float64)
        for weight, core in zip(row, all_cores, strict=True):
            mean += weight * core
        out.append(mean)
    return torch.stack(out)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Of the clock, and of all cores together: on a machine that others use too, the second says more."""

    wall: float
    cpu: float

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.wall * factor, self.cpu * factor)

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def timed(call: Callable[[], Any], times: int = 1) -> tuple[Seconds, Any]:
    """Median seconds, and the last result."""
    found = []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return Seconds(*np.median(found, axis=0).tolist()), result


def pairs(m: int) -> float:
    return m * (m - 1) / 2


def difference(found: Any, expected: Any) -> float:
    """The largest relative one."""
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    return float(np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-300), initial=0.0))


def row(what: str, ours: Seconds, loop: Seconds | None, off: float | None, **more: Any) -> Row:
    found: Row = {"what": what, "seconds": ours.wall, "cpu_seconds": ours.cpu, "difference": off, **more}
    if loop:
        found |= {"loop_seconds": loop.wall, "loop_cpu_seconds": loop.cpu, "ratio": loop.cpu / ours.cpu}
    return found


def measure_cka(m: int, few: int) -> Row:
    all_cores = cores(m) - torch.eye(RANK)
    cka(all_cores)
    seconds, found = timed(lambda: cka(all_cores), 5)
    loop, expected = timed(lambda: loop_cka(all_cores[:few]))
    loop = loop * (pairs(m) / pairs(few))
    return row(f"CKA, {m:,} clients x {LAYERS} x {RANK}", seconds, loop, difference(found[:few, :few], expected))


def measure_distances(m: int, few: int, new: int) -> list[Row]:
    clients = mixtures(m, ragged=False)
    seconds, found = timed(lambda: distance_matrix(clients))
    loop, expected = timed(lambda: loop_distances(clients[:few]))
    each = loop * (1 / pairs(few))
    shape = f"{CLASSES} x {COMPONENTS} x {DIM}"
    all_at_once = row(
        f"all distances, {m:,} clients x {shape}", seconds, each * pairs(m), difference(found[:few, :few], expected)
    )
    old = m - new
    seconds, grown = timed(lambda: distance_matrix(clients, known=found[:old, :old]))
    incremental = row(
        f"{new} clients more, {m:,} in all", seconds, each * (pairs(m) - pairs(old)), difference(grown, found),
        note="difference: from all at once",
    )  # fmt: skip
    return [all_at_once, incremental]


def aggregation(m: int, few: int, sampled: int) -> list[Row]:
    """The first aggregation, in which all tell of their data, and one a round later."""
    algorithm = CELoRA()  # type: ignore[call-arg]  # every field has a default
    names = [f"layer.{i:02d}.C" for i in range(LAYERS)]
    clients, told = [f"client-{i:05d}" for i in range(m)], mixtures(m, ragged=True)
    first, second = cores(m), cores(m, seed=2)
    start = algorithm.server_init({name: torch.eye(RANK) for name in names}, ())

    def ups(moved: Tensor, summaries: Sequence[Mixture | None]) -> dict[str, Up]:
        """As they come from the wire: a tensor of its own for each client and layer."""
        sent = zip(clients, moved, summaries, strict=True)
        return {c: Up({n: t.clone() for n, t in zip(names, core, strict=True)}, 100, s) for c, core, s in sent}

    heard = ups(first, told)
    arrival, server = timed(lambda: algorithm.aggregate(start, Heard(heard)))
    heard = ups(second, [None] * m)
    seconds, server = timed(lambda: algorithm.aggregate(server, Heard(heard)))
    peak = peak_mb() / 2**10
    state = len(
        pack(Server(start.start, {}, {}, {}, server.distances, server.near, server.typical, server.mixing, {}, 2))
    )
    more = {"peak_gib": peak, "state_mib": state / 2**20}

    moved = second - torch.eye(RANK)
    loop = timed(lambda: loop_cka(moved[:few]))[0] * (pairs(m) / pairs(few))
    some = torch.linspace(0, m - 1, min(few, m)).long()
    weights = server.mixing.weights[some]
    if server.mixing.neighbours is not None:
        weights = torch.zeros(len(some), m, dtype=torch.float64).scatter_(
            1, server.mixing.neighbours[some].long(), weights
        )
    seconds_few, expected = timed(lambda: loop_average(weights, second))
    found = torch.stack([torch.stack([server.received[clients[i]][n] for n in names]) for i in some.tolist()])
    off = float((found - expected).abs().max() / expected.abs().max())
    loop += seconds_few * (m / len(some))
    if server.mixing.neighbours is not None:
        more["recall"], more["similarity_kept"] = quality(server, told, moved, sampled)
    return [
        row(f"aggregation of {m:,}, all summaries new", arrival, None, None, peak_gib=peak),
        row(f"aggregation of {m:,}, summaries known", seconds, loop, off, **more),
    ]


def quality(server: Server, told: Sequence[Mixture], moved: Tensor, sampled: int) -> tuple[float, float]:
    """Of the neighbours most alike in the exact S: how many were found, and how alike those found are in comparison."""
    assert server.mixing.neighbours is not None
    m, k = len(told), server.mixing.neighbours.shape[1] - 1
    recalls, kept = [], []
    for i in torch.linspace(0, m - 1, sampled).long().tolist():
        others = torch.tensor([j for j in range(m) if j != i])
        distance = pair_distances(told, torch.stack([torch.full_like(others, i), others], dim=1))
        own = torch.zeros(1, m, dtype=torch.bool)
        own[0, i] = True
        row = torch.zeros(1, m, dtype=torch.float64)
        row[0, others] = distance
        data = kernel(row, own=own, typical=server.typical)
        model = torch.cat([cka(moved[[i, *some]])[:1, 1:] for some in torch.split(torch.arange(m), 200)], dim=1)
        alike = combine(data, model)[0]
        alike[i] = -torch.inf
        true = alike.topk(k).indices
        found = [j for j in server.mixing.neighbours[i].tolist() if j != i]
        recalls.append(len(set(found) & set(true.tolist())) / k)
        kept.append(float(alike[found].mean() / alike[true].mean()))
    return float(np.mean(recalls)), float(np.mean(kept))


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "widest_vectors": next((name for name in ("avx512f", "avx2") if name in flags), ""),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "scipy", "POT")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "server.json")
    parser.add_argument("--quick", action="store_true", help="a tenth of the clients: does it run?")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--aggregation", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    few = 6 if arguments.quick else 16
    if arguments.aggregation:
        print(json.dumps(aggregation(arguments.aggregation, few, 2 if arguments.quick else 16)))
        return
    described = machine()
    scale = 10 if arguments.quick else 1
    rows = [measure_cka(1000 // scale, few), *measure_distances(1000 // scale, few, 10)]
    for m in (1000 // scale, 1200 if arguments.quick else 10_000):
        command = [sys.executable, __file__, "--aggregation", str(m), "--threads", str(arguments.threads)]
        done = subprocess.run([*command, *["--quick"] * arguments.quick], check=True, capture_output=True, text=True)
        rows += json.loads(done.stdout)

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    table = Table("what", "seconds", "of CPU", "double loop", "ratio", "difference", "peak GiB", "recall", "S kept")
    for r in rows:
        table.add_row(
            r["what"], shown(r["seconds"], ".3g"), shown(r["cpu_seconds"], ".3g"),
            shown(r.get("loop_cpu_seconds"), ",.3g"), shown(r.get("ratio"), ",.0f"), shown(r["difference"], ".0e"),
            shown(r.get("peak_gib"), ".2f"), shown(r.get("recall"), ".2f"), shown(r.get("similarity_kept"), ".3f"),
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in described.items()))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
