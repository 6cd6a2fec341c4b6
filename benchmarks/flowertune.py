"""FlowerTune's job on SmolLM2, here and in Flower: the same texts, mini-batches, steps and rates; seconds and bytes.

    python benchmarks/flowertune.py [--rounds 3] [--steps 2] [--batch 4] [--turns 2]

examples/flowertune.toml with fewer steps of fewer rows: 20 clients, two of them in each round, rank 32, cosine over
rounds. Flower's app (benchmarks/flower-llm) has two nodes, which stand in for the clients that celora has drawn, and
trains on the very mini-batches that celora's clients train on; both start from the same LoRA, in float32. Contestants
take turns, each in fresh processes on all cores:

    Flower                      the app, as its users write it; no client is scored
    celora                      the same rounds; no client is scored

What celora does besides, when a run goes on to its end: the twin that trains alone with the same budget, every client's
score as received and after its own steps, and exports for all 20; that is not timed here, as Flower does none of it.

Losses of clients must be the same to 1 %, or the script fails. FlowerTune allows 200 GB; the bytes are arrays both ways
in Flower, and frames both ways in celora. Results go to benchmarks/results/flowertune.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import flower_job
from celora import experiment
from celora.experiment.population import Population, ResourceCache
from celora.models.smollm2 import smollm2
from measure import Result, Spread, save, show
from sweep import Tree, merged

ROOT = Path(__file__).parents[1]
APP = Path(__file__).parent / "flower-llm"
BUDGET = 200e9
"""Bytes that FlowerTune allows."""
TARGETS = ("q_proj", "v_proj")
"""PEFT's own for Llama."""
FLOWER, CELORA = "Flower", "celora"
CHILD = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from celora.experiment import resolve, run
job = json.loads(sys.stdin.read())
rounds = []
for event in run(resolve(job["tree"], Path()), Path(job["folder"]), twin=False):
    if event["event"] == "round":
        traffic = event["traffic"].values()
        rounds.append({
            "losses": {c: s["train"]["loss"] for c, s in event["scores"].items() if "train" in s},
            "heard": event["heard"], "seconds": event["seconds"],
            "bytes": sum(t["up_frame"] + t["down_frame"] for t in traffic),
        })
        if len(rounds) == job["stop"]:
            break
print(json.dumps(rounds))
"""


def celora(tree: Tree, cores: int, stop: int) -> Result:
    """The job in a fresh process, to the end of a round."""
    with tempfile.TemporaryDirectory() as name:
        job = {"tree": tree, "folder": f"{name}/run", "stop": stop}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps(job), capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    rounds = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": seconds, "events": rounds, "bytes": sum(r["bytes"] for r in rounds)}


def inputs(population: Population, drawn: list[list[str]], folder: Path) -> None:
    """The mini-batches of the drawn clients, by round, and the LoRA to start from under PEFT's names."""
    rounds = []
    for number, clients in enumerate(drawn, 1):
        learners = [population.learner(client, number) for client in clients]
        rounds.append(
            [{"rows": one.examples, "batches": [rows_of(batch) for batch in one.batches()]} for one in learners]
        )
    (folder / "data.json").write_text(json.dumps(rounds))
    names = {".A": ".lora_A.weight", ".B": ".lora_B.weight"}
    start = {
        f"base_model.model.model.{name[:-2]}{names[name[-2:]]}": weight.contiguous()
        for name, weight in population.initial.items()
    }
    save_file(start, folder / "initial.safetensors")


def rows_of(batch: Any) -> list[dict[str, list[int]]]:
    """The rows of a mini-batch, without padding."""
    found = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        own = labels[:length].tolist()
        found.append({"ids": ids[:length].tolist(), "labels": own + [-100] * (length - len(own))})
    return found


def flower(population: Population, drawn: list[list[str]], cores: int) -> Result:
    """The same in `flwr run`."""
    of = population.experiment
    with tempfile.TemporaryDirectory(prefix="fl-") as name:
        folder = Path(name)
        inputs(population, drawn, folder)
        config = {
            "num-server-rounds": len(drawn),
            "schedule-rounds": of.plan.rounds,
            "learning-rate-max": of.train.lr,
            "learning-rate-min": of.train.lr_end,
            "clip": of.train.clip,
            "rank": of.adapter.rank,
            "alpha": of.adapter.lora_alpha,
            "targets": ",".join(TARGETS),
            "model-name": str(smollm2()),
            "data": str(folder / "data.json"),
            "initial": str(folder / "initial.safetensors"),
        }
        return flower_job.run_app(APP, folder, config, nodes=len(drawn[0]), cores=cores, each=1)


def check_same(ours: Result, theirs: Result, drawn: list[list[str]]) -> float:
    """The largest relative difference of a client's training loss.

    Raises:
        RuntimeError: above 1 %.
    """
    gaps = []
    for event, clients, reports in zip(ours["events"], drawn, theirs["clients"], strict=False):
        reported = {clients[int(r["partition-id"])]: r["train_loss"] for r in reports}
        if set(reported) != set(clients):
            raise RuntimeError(f"clients of Flower failed: {sorted(reported)} reported of {clients}")
        gaps += [abs(event["losses"][client] / reported[client] - 1) for client in clients]
    largest: float = max(gaps)
    if largest > 0.01:
        raise RuntimeError(f"celora and Flower did not train the same: losses differ by up to {largest:.1%}")
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    if reason := flower_job.missing():
        sys.exit(f"skipped: {reason}")
    example = tomllib.loads((ROOT / "examples" / "flowertune.toml").read_text())
    smaller: Tree = {
        "data": {"max_validation": 2, "max_test": 2},
        "train": {"steps": arguments.steps, "batch_size": arguments.batch},
        "plan": {"rounds": arguments.rounds + 1, "evaluate_every": arguments.rounds + 1},  # the last is scored
    }
    tree, cores = merged(example, smaller), os.cpu_count() or 1
    population = ResourceCache().population(experiment.resolve(tree, Path()))
    drawn = [event["heard"] for event in celora(tree, cores, arguments.rounds)["events"]]  # not timed
    runs: dict[str, list[Result]] = {name: [] for name in (FLOWER, CELORA)}
    for _ in range(arguments.turns):
        runs[FLOWER].append(flower(population, drawn, cores))
        runs[CELORA].append(celora(tree, cores, arguments.rounds))
    gap = check_same(runs[CELORA][0], runs[FLOWER][0], drawn)
    times = {name: Spread(tuple(run["seconds"] for run in found)) for name, found in runs.items()}
    sent = {name: found[0]["bytes"] for name, found in runs.items()}
    shown = [
        {"engine": name, "seconds": spread, "time over Flower": spread.over(times[FLOWER]), "bytes": sent[name],
         "of 200 GB": f"{sent[name] / BUDGET:.4%}"}
        for name, spread in times.items()
    ]  # fmt: skip
    what = f"{arguments.rounds} rounds of {arguments.steps} steps of {arguments.batch} rows, 2 of 20 clients a round"
    show(f"{what}, {cores} cores; losses differ by at most {gap:.1e}", shown)
    content = {
        "seconds": {name: spread.json() for name, spread in times.items()},
        "over_flower": {name: spread.over(times[FLOWER]).json() for name, spread in times.items()},
        "bytes": sent, "budget": BUDGET, "largest_loss_difference": gap,
    }  # fmt: skip
    save("flowertune", {"job": content}, settings=vars(arguments))


if __name__ == "__main__":
    main()
