"""What the embedded engine costs and saves: ratios measured in one run, contestants taking turns.

    python benchmarks/engine.py [--only SECTION,…] [--repetitions 5] [--tiny]

central    celora against plain PEFT + torch on the same token batches, and on the same rows with usual padding
grouping   many clients in one pass through the backbone, 4 rows of 32 tokens each, against one after another
prefix     adapter.layers = "last:2": cached activations of the frozen layers below, filling them counted
rebuild    against a client loop that builds its PEFT model anew for every client
flower     against Flower's simulation of FedAvg-LoRA: same clients, texts, start, local steps, cores (extra `flower`)
memory     peak memory of 1,000 clients against 10
language   SmolLM2 for six clients against a plain loop of transformers and PEFT (benchmarks/language_speed.py)

Everything runs on the CPU with one torch thread, "central" and "grouping" again with one on every core. Tables go to
the screen, all numbers with the machine to benchmarks/results/engine.json; how each comparison is made is told in
docs/performance.md. With --tiny nothing is written: it only shows that all sections work.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

import flower_job
import job
import language_speed
from celora import experiment
from celora.core.learner import Batch, Learner
from celora.core.problems import Fit
from celora.core.rounds import run_rounds
from celora.core.solve import solve, solve_together
from celora.core.task import Examples
from celora.engines import embedded
from celora.errors import ModelError
from celora.experiment.population import Population, ResourceCache
from celora.models import loading
from celora.models.inputs import ReadyInputs
from celora.models.rows import Rows
from celora.tasks.classify import Classify
from celora.tensors import Tensors, but, mean, nbytes
from celora.wire import Schema
from measure import CLOCKS, Clock, Result, Spread, in_turns, save, show
from plain import Plain, encoder, padded, rebuilt, train
from sweep import Tree, merged

SEED = 0
COMMON: Tree = {
    "data": {"source": "docstrings", "partition": "iid", "max_validation": 1, "max_test": 1},
    "train": {"lr": 2e-3, "batch_size": 8},
    "plan": {"seed": SEED},
    "algorithm": {"name": "fedit"},
}


@dataclass(frozen=True)
class Size:
    """How large the jobs are."""

    repetitions: int
    clock: str = "wall"
    rows: int = 160
    clients: int = 12
    each: int = 32
    group_clients: int = 16
    group_steps: int = 4
    prefix_clients: int = 2
    prefix_repetitions: int = 2
    prefix_rounds: int = 10
    prefix_epochs: int = 3
    flower_clients: int = 50
    flower_rows: tuple[int, ...] = (4, 24)
    flower_rounds: int = 3
    flower_repetitions: int = 2
    many: int = 1000
    language_rows: int = 4
    language_repetitions: int = 2

    @property
    def time(self) -> Clock:
        return CLOCKS[self.clock]


TINY = Size(
    repetitions=1, rows=16, clients=3, each=8, group_clients=4, group_steps=1, prefix_clients=2, prefix_rounds=2,
    prefix_repetitions=1,
    flower_clients=3, flower_rows=(8,), flower_rounds=2, flower_repetitions=1, many=20,
    language_rows=4, language_repetitions=1,
)  # fmt: skip


# --- the engine, as far as this version has it


class Skipped(Exception):
    """Why a section cannot run here."""


def population_of(*trees: Tree) -> Population:
    return ResourceCache().population(experiment.resolve(merged(COMMON, *trees), Path()))


def federate(population: Population, group: int | None) -> None:
    """All rounds of a world, frames, screening, averages and the closing download included; no run folder."""
    of, stores = population.experiment, dict[str, Any]()
    ways = dataclasses.replace(population.experiment.engine, group=group).solver(population.models.device)
    exchange = embedded.Embedded(of.algorithm, population.learner, stores, Schema.of(population.initial), *ways)
    for done in run_rounds(of.algorithm, exchange, of.plan, population.clients, population.initial):
        if done.excluded:
            raise RuntimeError(f"a client failed: {done.excluded}")


def fit(population: Population, client: str) -> Tensors:
    """One local training problem, as an algorithm hands it over."""
    learner = population.learner(client, 1)

    def turn() -> Generator[Any, Any, Tensors]:
        weights: Tensors = (yield from Fit({}, train=but("C"))).weights
        return weights

    (found,) = solve([(learner, turn())])
    if isinstance(found, Exception):
        raise found
    solved: Tensors = found
    return solved


# --- plain PEFT


def lora_of(population: Population) -> dict[str, Any]:
    adapter, targets = population.experiment.adapter, population.experiment.adapter.targets
    return {
        "rank": adapter.rank,
        "alpha": adapter.lora_alpha,
        "targets": targets,
        "classes": len(classes_of(population)),
    }


def classes_of(population: Population) -> Sequence[str]:
    """The labels that the clients have agreed on."""
    task = population.task
    assert isinstance(task, Classify)
    assert task.classes
    return task.classes


def plain_of(population: Population) -> Plain:
    return Plain(encoder(), **lora_of(population))


def batches_of(learner: Learner) -> list[Batch]:
    """The very mini-batches that celora's learner of the same client and round trains on."""
    return list(learner.batches())


def tokens_in(batches: Iterable[Batch]) -> tuple[int, int]:
    """(real, padded) tokens."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)


def apart(one: Tensors, other: Mapping[str, Tensor]) -> float:
    """Largest difference between two trainings, in units of the largest weight."""
    largest = max(float(tensor.detach().abs().max()) for tensor in other.values())
    return max(float((one[name] - tensor.detach()).abs().max()) for name, tensor in other.items()) / largest


# --- sections


SAME, USUAL, WIDEST = "plain, the same tensors", "plain, padded to the longest of shuffled rows", "plain, padded to 128"


def central(size: Size) -> Result:
    """One learner, then a whole round, against plain PEFT on the same tensors and with usual padding."""
    population = population_of({"data": {"clients": 1, "rows": size.rows}, "plan": {"rounds": 1}})
    (client,) = population.clients
    recipe, model, rows = population.experiment.train, plain_of(population), population.rows[client]["train"]
    examples: Any = rows.examples.inputs
    inputs: Any = [row.tolist() for row in examples.fetch(rows.at)]
    batches = batches_of(population.learner(client, 1))
    shuffled = partial(padded, inputs, rows.targets["labels"], recipe.batch_size, SEED)

    def by_hand(make: Callable[[], Iterable[Batch]]) -> None:
        model.start_from(population.initial)
        train(model, make(), recipe)

    by_hand(lambda: batches)
    difference = apart(fit(population, client), model.named())
    times = in_turns(
        {
            "celora": lambda: fit(population, client),
            SAME: lambda: by_hand(lambda: batches),
            USUAL: lambda: by_hand(lambda: shuffled(None)),
            WIDEST: lambda: by_hand(lambda: shuffled(128)),
        },
        size.repetitions,
        size.time,
    )
    real, filled = tokens_in(batches)
    fills = {"celora": filled, SAME: filled, USUAL: tokens_in(shuffled(None))[1], WIDEST: tokens_in(shuffled(128))[1]}
    title = f"One pass over {len(rows)} rows, batches of {recipe.batch_size}; largest difference {difference:.0e}"
    show(title, compared(times, real, fills))
    over = {name: times["celora"].over(times[name]) for name in (SAME, USUAL, WIDEST)}
    print("time of celora over " + "; ".join(f"{name} {spread}" for name, spread in over.items()))
    return {
        "fit": {
            "rows": len(rows), "seconds": as_json(times), "real_tokens": real, "padded_tokens": fills,
            "largest_difference": difference, "celora_over": as_json(over),
        },
        "round": central_round(size),
    }  # fmt: skip


def central_round(size: Size) -> Result:
    """A whole round of FedIT against one model trained on the mini-batches of all clients."""
    population = population_of(
        {"data": {"clients": size.clients, "rows": size.each, "validation": 0.0}, "plan": {"rounds": 1}}
    )
    model = plain_of(population)
    union = [batch for client in population.clients for batch in batches_of(population.learner(client, 1))]

    def by_hand() -> None:
        model.start_from(population.initial)
        train(model, union, population.experiment.train)

    times = in_turns({SAME: by_hand, **rounds_of(population)}, size.repetitions, size.time)
    real, filled = tokens_in(union)
    title = f"A whole round of FedIT, {len(population.clients)} clients × {size.each} rows, against central training"
    show(title, compared(times, real, dict.fromkeys(times, filled)))
    over = {name: spread.over(times[SAME]) for name, spread in times.items() if name != SAME}
    return {
        "clients": len(population.clients), "seconds": as_json(times), "real_tokens": real, "padded_tokens": filled,
        "over_same_tensors": as_json(over),
    }  # fmt: skip


def rounds_of(population: Population) -> dict[str, Callable[[], object]]:
    """The embedded engine's ways to run this world."""
    return {"celora, alone": partial(federate, population, 1), "celora, grouped": partial(federate, population, None)}


def compared(times: Mapping[str, Spread], tokens: int, filled: Mapping[str, int]) -> list[Result]:
    """A table's rows: microseconds a real token, and how many times as long as plain PEFT on the same tensors."""
    return [
        {
            "contestant": name, "µs a real token": spread.times(1e6 / tokens),
            "padding": f"{filled[name] / tokens - 1:.0%}", f"time over {SAME}": spread.over(times[SAME]),
        }
        for name, spread in times.items()
    ]  # fmt: skip


def as_json(times: Mapping[str, Spread]) -> Result:
    return {name: spread.json() for name, spread in times.items()}


def labelled(labels: Tensor, rows: Sequence[int]) -> Tensors:
    """The targets of a classifier."""
    return {"labels": labels[torch.as_tensor(rows)]}


def grouping(size: Size) -> Result:
    """Clients with 4 rows of 32 tokens a step: alone, and K in one pass."""
    population = population_of(
        {"data": {"clients": size.group_clients, "rows": 8}, "train": {"batch_size": 4, "steps": size.group_steps}}
    )
    classes, draw = len(classes_of(population)), torch.Generator().manual_seed(SEED)
    for client in population.clients:
        ids: list[list[int]] = torch.randint(1000, 30000, (4 * size.group_steps, 32), generator=draw).tolist()
        labels = torch.randint(classes, (len(ids),), generator=draw)
        population.rows[client] = {
            "train": Rows(Examples(ReadyInputs(ids), partial(labelled, labels)), range(len(ids)))
        }

    def all_clients(group: int | None) -> list[Tensors]:
        def turn() -> Generator[Any, Any, Tensors]:
            weights: Tensors = (yield from Fit({}, train=but("C"))).weights
            return weights

        found: list[Tensors | Exception] = []
        cohort = group or len(population.clients)
        for start in range(0, len(population.clients), cohort):
            jobs = [(population.learner(client, 1), turn()) for client in population.clients[start : start + cohort]]
            found += solve(jobs) if group == 1 else solve_together(jobs)
        if failed := [one for one in found if isinstance(one, Exception)]:
            raise failed[0]
        return [one for one in found if not isinstance(one, Exception)]

    sizes: list[int | None] = [1, *(k for k in (2, 4, 8, 16) if k <= size.group_clients), None]
    names = {group: "alone" if group == 1 else f"{group} in a pass" if group else "as many as pay" for group in sizes}
    difference = max(apart(one, two) for one, two in zip(all_clients(None), all_clients(1), strict=True))
    times = in_turns({names[group]: partial(all_clients, group) for group in sizes}, size.repetitions, size.time)
    tokens = size.group_clients * size.group_steps * 4 * 32
    shown = [
        {"clients": name, "µs a token": t.times(1e6 / tokens), "times as fast as alone": times["alone"].over(t)}
        for name, t in times.items()
    ]
    show(f"{size.group_clients} clients, 4 rows × 32 tokens a step; largest difference {difference:.0e}", shown)
    faster = {name: times["alone"].over(spread).json() for name, spread in times.items()}
    return {"seconds": as_json(times), "speed_over_alone": faster, "tokens": tokens, "largest_difference": difference}


def prefix(size: Size) -> Result:
    """Whole runs with only the top two layers adapted, of MiniLM's 6 layers and of an encoder like it of 12."""
    with tempfile.TemporaryDirectory() as name:
        deep = Path(name)
        deeper(deep, layers=12)
        kinds = {"6 layers (MiniLM)": "minilm", "12 layers": str(deep)}
        return {kind: prefix_of(size, kind, backbone) for kind, backbone in kinds.items()}


def deeper(folder: Path, layers: int) -> None:
    """An encoder of MiniLM's width and tokenizer with more layers; its weights are random, which no clock can tell."""
    shutil.copytree(loading.embedded(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    make: Any = AutoModel.from_config  # transformers does not type it
    make(config).save_pretrained(folder)


def prefix_of(size: Size, kind: str, backbone: str) -> Result:
    """Cached prefixes against computing them in every round, and against adapting all layers."""
    tree = merged(
        COMMON,
        {
            "data": {"clients": size.prefix_clients, "rows": size.each},
            "plan": {"rounds": size.prefix_rounds, "evaluate_every": size.prefix_rounds},
            "train": {"epochs": size.prefix_epochs},
            "model": {"backbone": backbone},
        },
    )
    cached, computed, everywhere = "last:2, cached", "last:2, not cached", "all layers adapted"
    changes: dict[str, Tree] = {
        cached: {"adapter": {"layers": "last:2"}, "engine": {"cache_mb": 1024}},
        computed: {"adapter": {"layers": "last:2"}, "engine": {"cache_mb": 0}},
        everywhere: {"engine": {"cache_mb": 0}},
    }
    rounds: dict[str, list[float]] = {name: [] for name in changes}
    later: dict[str, list[float]] = {name: [] for name in changes}
    losses: dict[str, float] = {}

    def one(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = job.run(merged(tree, changes[name]), Path(folder) / "run", size.time)
        rounds[name].append(found["ends"][-1])
        later[name].append(found["ends"][-1] - found["ends"][0])
        losses[name] = average(found["losses"][-1].values())

    whole = in_turns({name: partial(one, name) for name in changes}, size.prefix_repetitions, size.time)
    within = {name: Spread(tuple(values[1:])) for name, values in rounds.items()}  # the first turn is not counted
    after = {name: Spread(tuple(values[1:])) for name, values in later.items()}
    faster = {name: within[name].over(within[cached]) for name in changes}
    then = {name: after[name].over(after[cached]) for name in changes}
    shown = [
        {
            "adapters": name, "seconds of the rounds": within[name], "of the whole run": whole[name],
            "time over cached, rounds": faster[name], "after the first": then[name], "last loss": losses[name],
        }
        for name in changes
    ]  # fmt: skip
    what = (
        f"{size.prefix_clients} clients × {size.each} rows, {size.prefix_rounds} rounds of {size.prefix_epochs} epochs"
    )
    show(f"{kind}: {what}; filling is counted", shown)
    return {
        "rounds": as_json(within), "whole": as_json(whole), "losses": losses,
        "speed_of_cached": as_json(faster), "speed_of_cached_after_the_first_round": as_json(then),
        "speed_of_cached_whole_run": as_json({name: whole[name].over(whole[cached]) for name in changes}),
    }  # fmt: skip


def average(numbers: Iterable[float]) -> float:
    return statistics.fmean(numbers)


def rebuild(size: Size) -> Result:
    """One round of FedIT against a loop that copies the encoder and calls `get_peft_model` for every client."""
    population = population_of(
        {"data": {"clients": size.clients, "rows": size.each, "validation": 0.0}, "plan": {"rounds": 1}}
    )
    base, settings, recipe = encoder(), lora_of(population), population.experiment.train
    batches = {client: batches_of(population.learner(client, 1)) for client in population.clients}
    building: list[float] = []

    def loop() -> None:
        trained, spent = [], 0.0
        for client in population.clients:
            began = size.time()
            model = rebuilt(base, **settings)
            spent += size.time() - began
            model.start_from(population.initial)
            train(model, batches[client], recipe)
            trained.append({name: parameter.detach().clone() for name, parameter in model.named().items()})
        mean((one, len(population.rows[c]["train"])) for c, one in zip(population.clients, trained, strict=True))
        building.append(1000 * spent / len(population.clients))

    times = in_turns({"a model for each client": loop, **rounds_of(population)}, size.repetitions, size.time)
    building_ms = Spread(tuple(building[1:]))
    learner = in_turns(
        {"learner": lambda: [population.learner(c, 1) for c in population.clients]}, size.repetitions, size.time
    )["learner"]
    learner_ms = learner.times(1000 / len(population.clients))
    shown = [
        {"contestant": n, "seconds a round": t, "time over the loop's": t.over(times["a model for each client"])}
        for n, t in times.items()
    ]
    show(f"{len(population.clients)} clients × {size.each} rows, one round", shown)
    print(f"to set up a client: {building_ms} ms by deepcopy and get_peft_model, {learner_ms} ms by celora")
    return {
        "seconds": as_json(times), "setup_ms": {"loop": building_ms.json(), "celora": learner_ms.json()},
        "speed_over_loop": {name: times["a model for each client"].over(t).json() for name, t in times.items()},
    }  # fmt: skip


def flower(size: Size) -> Result:
    """The same federated job here and in Flower's simulation, each in processes of its own, taking turns."""
    if reason := flower_job.missing():
        raise Skipped(reason)
    return {f"{rows} rows a client": against_flower(size, rows) for rows in size.flower_rows}


def against_flower(size: Size, rows: int) -> Result:
    cores = os.cpu_count() or 1
    tree = merged(
        COMMON,
        {
            "data": {"clients": size.flower_clients, "rows": rows, "max_validation": 1},
            "plan": {"rounds": size.flower_rounds, "evaluate_every": size.flower_rounds},
        },
    )
    population = population_of(tree)
    theirs = {"Flower": 1, "Flower, as it comes": 2}
    runs: dict[str, list[Result]] = {}
    kinds = {f"celora, {threads} thread{'s'[: threads > 1]}": threads for threads in dict.fromkeys((1, cores))}
    for turn in range(size.flower_repetitions):
        order = [*kinds, *theirs]
        for name in order if turn % 2 == 0 else order[::-1]:
            found = alone(tree, kinds[name]) if name in kinds else flower_run(population, cores, theirs[name])
            runs.setdefault(name, []).append(found)
    runs = {name: runs[name] for name in (*kinds, *theirs)}
    parts = {"whole command": "seconds", "all rounds": "rounds", "rounds after the first": "later"}
    times = {
        name: {part: Spread(tuple(run[key] for run in found)) for part, key in parts.items()}
        for name, found in runs.items()
    }
    ratios = {
        f"{name} against {their}": {part: times[their][part].over(spread) for part, spread in times[name].items()}
        for their in theirs
        for name in kinds
    }
    losses = {name: [average(values) for values in found[0]["losses"]] for name, found in runs.items()}
    show(
        f"Seconds of FedAvg of LoRA and head, {size.flower_clients} clients × {rows} rows, "
        f"{size.flower_rounds} rounds, {cores} cores",
        [{"engine": name, **of, "last loss": losses[name][-1]} for name, of in times.items()],
    )
    show("Times as fast", [{"engine": name, **of} for name, of in ratios.items()])
    spent = {
        key: average(m[f"seconds-{key}"] for run in runs["Flower"] for of_round in run["clients"] for m in of_round)
        for key in ("model", "data", "train")
    }
    print(
        "a turn of Flower's client spends, in seconds: " + ", ".join(f"{k} {value:.3f}" for k, value in spent.items())
    )
    print("mean losses by round: " + "; ".join(f"{n} {', '.join(f'{x:.4f}' for x in v)}" for n, v in losses.items()))
    check_same(losses)
    return {
        "cores": cores, "seconds": {name: as_json(of) for name, of in times.items()},
        "speed": {name: as_json(of) for name, of in ratios.items()},
        "losses": losses, "flower_client_seconds": spent,
    }  # fmt: skip


def check_same(losses: Mapping[str, Sequence[float]]) -> None:
    """Both must have trained the same thing: rows come in another order, so losses are near and not equal."""
    theirs = losses["Flower"]
    for name, ours in losses.items():
        gaps = [abs(one / two - 1) for one, two in zip(ours, theirs, strict=True)]
        if max(gaps) > 0.05:
            raise RuntimeError(f"{name} and Flower did not train the same: mean losses {ours} and {theirs}")


def alone(tree: Tree, threads: int) -> Result:
    """A celora job in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = {"tree": tree, "folder": str(folder / "run"), "threads": threads}
        (folder / "job.json").write_text(json.dumps(task))
        script = Path(__file__).with_name("job.py")
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, str(script), str(folder / "job.json"), str(folder / "out.json")],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}, check=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        found: Result = json.loads((folder / "out.json").read_text())
    ends = found["ends"]
    losses = [list(of_round.values()) for of_round in found["losses"]]
    times = {"seconds": seconds, "rounds": ends[-1], "later": ends[-1] - ends[0]}
    return {**times, "losses": losses, "peak_mb": found["peak_mb"]}


def flower_run(population: Population, cores: int, each: int) -> Result:
    found = flower_job.run(population, cores, each)
    if any(len(of_round) != len(population.clients) for of_round in found["clients"]):
        raise RuntimeError(f"clients of Flower failed: {[len(of_round) for of_round in found['clients']]} reported")
    losses = [[m["train_loss"] for m in of_round] for of_round in found["clients"]]
    return {**found, "rounds": sum(found["rounds"]), "later": sum(found["rounds"][1:]), "losses": losses}


def memory(size: Size) -> Result:
    """Peak resident memory of fresh processes: few and many clients, one round, one step, the same rows each."""
    shown, content = [], {}
    for algorithm in ("fedit", "ce-lora"):
        peaks: dict[int, float] = {}
        seconds: dict[int, float] = {}
        for clients in (10, size.many):
            tree = merged(
                COMMON,
                {
                    "data": {"clients": clients, "rows": 2},
                    "train": {"batch_size": 2, "steps": 1},
                    "plan": {"rounds": 1},
                    "algorithm": {"name": algorithm},
                },
            )
            found = alone(tree, 1)
            peaks[clients], seconds[clients] = found["peak_mb"], found["rounds"]
        ratio = peaks[size.many] / peaks[10]
        private = size.many * nbytes(population_of({"data": {"clients": 10, "rows": 2}}).initial) / 2**20
        few, many = "10 clients, MB", f"{size.many:,} clients, MB"
        row = {"algorithm": algorithm, few: round(peaks[10]), many: round(peaks[size.many]), "ratio": ratio}
        shown.append({**row, "seconds": seconds[size.many], "one adapter each, MB": round(private)})
        content[algorithm] = {"peak_mb": peaks, "ratio": ratio, "seconds": seconds, "one_adapter_each_mb": private}
    show("Peak memory of a process: one round of one step, then scores", shown)
    return content


def language(size: Size) -> Result:
    """SmolLM2 for six clients: training, memory, generation."""
    try:
        return language_speed.language(size.language_rows, size.language_repetitions, size.time)
    except ModelError as missing:  # its package is not installed
        raise Skipped(str(missing)) from missing


SECTIONS_HERE: dict[str, Callable[[Size], Result]] = {
    "central": central, "grouping": grouping, "prefix": prefix, "rebuild": rebuild, "flower": flower, "memory": memory,
    "language": language,
}  # fmt: skip


def with_threads(section: Callable[[Size], Result], size: Size, name: str) -> Result:
    """A section with one torch thread, and with one on every core; some see to their processes' threads themselves."""
    if name in ("flower", "memory"):
        return section(size)
    found = {}
    for threads in dict.fromkeys((1, os.cpu_count() or 1)) if name in ("central", "grouping") else (1,):
        torch.set_num_threads(threads)
        print(f"-- torch threads: {threads}", flush=True)
        found[f"torch threads: {threads}"] = section(size)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS_HERE), help="sections, separated by commas")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: where others compute too; flower is always wall"
    )
    parser.add_argument("--tiny", action="store_true", help="a minute, nothing written: do all sections work?")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS_HERE]:
        sys.exit(f"--only: found {', '.join(unknown)}; expected some of {', '.join(SECTIONS_HERE)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Flower's processes are ended then, too
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers, about a name that PEFT uses
    size = TINY if arguments.tiny else Size(arguments.repetitions)
    size = dataclasses.replace(size, clock=arguments.clock)
    skipped: dict[str, str] = {}
    for name in wanted:
        print(f"\n== {name}", flush=True)
        try:
            content = with_threads(SECTIONS_HERE[name], size, name)
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        if not arguments.tiny:
            save("engine", {name: content}, settings={"seed": SEED, **dataclasses.asdict(size)})
    for name, why in skipped.items():
        print(f"{name} skipped: {why}")


if __name__ == "__main__":
    main()
