"""What every benchmark shares: the machine in words, repetitions that take turns, and results as JSON and a table.

Contestants are timed in turns (first, second, …, first, second, …) and compared by ratios of the same turn, so that a
machine that is slow for a while is slow for all of them.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Result = dict[str, Any]

PACKAGES = ("celora", "torch", "transformers", "peft", "numpy", "safetensors", "flwr", "ray")
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """CPU, cores, memory and versions."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "versions": versions,
    }


def _cpu() -> str:
    """The model name; a virtual machine may only tell the family."""
    lines: list[str] = []
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one number."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def over(self, other: "Spread") -> "Spread":
        """The ratio of each turn."""
        return Spread(tuple(one / two for one, two in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> "Spread":
        return Spread(tuple(value * factor for value in self.values))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{min(self.values):.3g}, {max(self.values):.3g}]"

    def json(self) -> dict[str, Any]:
        values = [float(f"{value:.5g}") for value in self.values]
        return {"median": float(f"{self.median:.5g}"), "least": min(values), "most": max(values), "values": values}


Clock = Callable[[], float]
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds on the wall; or of this process on all its cores, for a machine that others use at the same time."""


def seconds(work: Callable[[], object], clock: Clock) -> float:
    """The time of one call."""
    began = clock()
    work()
    return clock() - began


def in_turns(
    contestants: Mapping[str, Callable[[], object]], repetitions: int, clock: Clock = time.perf_counter
) -> dict[str, Spread]:
    """Seconds of each contestant; a first turn of all is not counted, and every other turn runs backwards."""
    for work in contestants.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions):
        for name in list(contestants) if turn % 2 == 0 else list(contestants)[::-1]:
            found[name].append(seconds(contestants[name], clock))
    return {name: Spread(tuple(values)) for name, values in found.items()}


def show(title: str, rows: Sequence[Mapping[str, object]], note: str = "") -> None:
    """A table on the screen; all rows have the same columns."""
    table = Table(title=escape(title), title_justify="left", caption=note or None, caption_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) and not value[:1].isdigit() else "right")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else f"{v:.3g}" if isinstance(v, float) else str(v)
                        for v in row.values()))  # fmt: skip
    Console(width=Console(width=1000).measure(table).maximum).print(table)  # whole, however narrow the terminal


def save(name: str, sections: Mapping[str, Any], *, settings: Mapping[str, Any]) -> Path:
    """Add sections to benchmarks/results/<name>.json; sections that were not run this time stay, each with its own
    machine, settings and time."""
    target = RESULTS / f"{name}.json"
    whole: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    stamp = {"machine": machine(), "settings": dict(settings), "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    whole |= {section: {**stamp, **content} for section, content in sections.items()}
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(whole, indent=1) + "\n")
    return target
