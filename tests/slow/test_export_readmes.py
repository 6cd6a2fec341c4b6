"""The code in the README.md of an export, run without celora in any folder, gives the score that celora's summary says.

Tiny random models of nine architectures are trained in real runs, exported, and scored in one process that can import
neither celora nor anything of these tests.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from celora import experiment
from celora.experiment.exports import export
from celora.experiment.trained import TrainedRun, load
from tests.language import saved as saved_language_model
from tests.unit.test_models_architectures import ARCHITECTURES, saved

pytestmark = pytest.mark.slow
CLASSIFIERS = ["bert", "roberta", "distilbert", "electra", "gpt2", "llama", "qwen2", "gemma", "mistral", "vit"]
LANGUAGE_MODELS = ["gpt2", "llama", "qwen2"]
MERGED = {"bert", "gpt2", "llama", "vit"}
SCORED = '''
import json, re, sys, warnings
from importlib.util import find_spec
from pathlib import Path

sys.path[:] = [path for path in sys.path if not (Path(path or ".") / "celora").is_dir()]
assert find_spec("celora") is None
warnings.filterwarnings("ignore", category=FutureWarning)  # peft 0.21 calls what transformers 5.23 deprecates
import torch


def said(job):
    """What the model answers for each row, as celora says it."""
    code = re.search("```python\\n(.*?)```", Path(job["folder"], "README.md").read_text(), re.S)[1]
    assert code.count(job["placeholder"]) == 1, code
    names = {}
    exec(code.replace(job["placeholder"], job["rows"]), names)
    if job["kind"] == "prompts":
        return [answer.strip() for answer in names["answers"]]
    classes = json.loads(Path(job["folder"], "celora.json").read_text())["classes"]
    best = names["logits"].argmax(-1).tolist()
    if job["kind"] != "words":
        return [classes[answer] for answer in best]
    ids = [names["inputs"].word_ids(row) for row in range(len(best))]
    return [
        [classes[answers[at.index(word)]] for word in range(max(word for word in at if word is not None) + 1)]
        for answers, at in zip(best, ids, strict=True)
    ]


def score(job):
    """Its answers, and the share of them that is right."""
    answers = said(job)
    pairs = list(zip(answers, job["labels"], strict=True))
    if job["kind"] == "words":
        pairs = [pair for row in pairs for pair in zip(*row, strict=False)]
    return answers, sum(answer == label for answer, label in pairs) / len(pairs)


print(json.dumps([score(job) for job in json.load(sys.stdin)]))
'''
COMMON = """
[model]
backbone = "{model}"
device = "cpu"
max_length = 24
[adapter]
rank = 3
targets = "{targets}"
[train]
lr = 2e-2
batch_size = 8
epochs = {epochs}
[plan]
rounds = 1
[algorithm]
name = "ce-lora"
"""
SOURCES = {
    "texts": '[data]\nsource = "texts/*.csv"\n',
    "images": '[data]\nsource = "digits"\nclients = 2\nrows = 24\nmax_validation = 8\nmax_test = 24\n',
    "words": '[data]\nsource = "words/*.jsonl"\n[task]\nname = "tag"\nscore = "accuracy"\n',
    "prompts": '[data]\nsource = "prompts/*.jsonl"\n[task]\nname = "causal-lm"\nscore = "exact_match"\n'
    "answer_tokens = 3\n",
}
PLACEHOLDERS = {
    "texts": '["a text", "and another one"]',
    "images": "torch.rand(2, 1, 8, 8)",
    "words": '[["some", "words"], ["and", "others"]]',
    "prompts": '["a prompt", "and another one"]',
}


class Job(NamedTuple):
    """A run, what of it is exported, and how."""

    model: str
    kind: str
    format: str


JOBS = [
    *(Job(name, "images" if name == "vit" else "texts", "peft") for name in CLASSIFIERS),
    *(Job(name, "images" if name == "vit" else "texts", "merged") for name in CLASSIFIERS if name in MERGED),
    *(Job(name, "prompts", "peft") for name in LANGUAGE_MODELS),
    Job("llama", "prompts", "merged"),
    Job("bert", "words", "peft"),
    Job("bert", "words", "merged"),
]


def rows(folder: Path) -> None:
    """Two sites of texts, of words with tags, and of prompts whose answer is the first letter."""
    draw = random.Random(0)
    for kind in ("texts", "words", "prompts"):
        (folder / kind).mkdir()
    for site in "ab":
        texts, words, prompts = ["text,label"], list[Any](), list[Any]()
        for _ in range(60):
            first = draw.choice("xyz")
            text = first * draw.randint(2, 5) + " " + "".join(draw.choices("abcdefg ", k=draw.randint(1, 18))) + "."
            texts.append(f"{text},{first} {draw.choice('pq')}")
            tokens = ["".join(draw.choices("abc", k=draw.randint(1, 3))) for _ in range(draw.randint(2, 6))]
            words.append({"tokens": tokens, "tags": [draw.choice([token[0], "o"]) for token in tokens]})
            prompts.append({"prompt": text, "completion": draw.choice("ab")})
        (folder / "texts" / f"{site}.csv").write_text("\n".join(texts))
        for kind, found in (("words", words), ("prompts", prompts)):
            (folder / kind / f"{site}.jsonl").write_text("\n".join(map(json.dumps, found)))


def run(root: Path, job: Job) -> Path:
    """The folder of a finished run."""
    out = root / f"run-{job.model}-{job.kind}"
    if out.exists():
        return out
    model = root / f"{job.model}-{job.kind}"
    of = ARCHITECTURES[job.model]
    if job.kind == "prompts":
        saved_language_model(model, job.model, begins=job.model == "llama")
    else:
        saved(of.config, model)
    targets = rf".*\\.{of.suffix}" if job.kind != "prompts" else r".*\\.(q_proj|c_attn)"
    epochs = {"prompts": 1, "images": 20}.get(job.kind, 3)
    text = SOURCES[job.kind] + COMMON.format(model=model.name, targets=targets, epochs=epochs)
    text = text.replace('"ce-lora"', '"fedit"') if job.kind in ("prompts", "words") else text
    (root / "config.toml").write_text(text)
    list(experiment.run(experiment.read(root / "config.toml"), out, twin=False))
    return out


def rows_of_test(of: TrainedRun, client: str, kind: str) -> tuple[Any, list[Any]]:
    """A client's test rows, and what is right."""
    inputs: Any = of.data.table.inputs
    at = of.data.clients[client].test
    match kind:
        case "texts":
            return [inputs[row] for row in at], [of.data.table.labels[row] for row in at]
        case "images":
            return torch.stack([inputs[row] for row in at]), [of.data.table.labels[row] for row in at]
        case "words":
            return [inputs[row]["tokens"] for row in at], [inputs[row]["tags"] for row in at]
        case _:
            return [inputs[row]["prompt"] for row in at], [inputs[row]["completion"] for row in at]


def test_the_code_of_an_exports_readme_gives_the_score_of_the_summary_without_celora(tmp_path: Path) -> None:
    rows(tmp_path)
    asked, expected = [], []
    for job in JOBS:
        of = load(run(tmp_path, job))
        for one in export(of.folder, "all", job.format, tmp_path / "out" / "-".join(job)):
            given, labels = rows_of_test(of, one.client, job.kind)
            asked.append({
                "folder": str(one.what.folder), "kind": job.kind, "placeholder": PLACEHOLDERS[job.kind],
                "rows": f"torch.tensor({given.tolist()})" if job.kind == "images" else repr(given), "labels": labels,
            })  # fmt: skip
            expected.append((of[one.client].predict(given), of[one.client].score))
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCORED],
        input=json.dumps(asked), cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    alike = list[str]()
    for job, (answers, score), (their_answers, their_score) in zip(asked, expected, found, strict=True):
        assert their_answers == list(answers), job["folder"]
        assert their_score == pytest.approx(score, abs=1e-6), job["folder"]
        alike += [job["folder"]] if len({str(answer) for answer in answers}) == 1 else []
    assert not alike  # one answer for all rows would prove little
