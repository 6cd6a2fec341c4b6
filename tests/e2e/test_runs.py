"""The whole way, from a TOML file to a run folder, with a real (small, random) transformer and real digits."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from celora import experiment
from celora.cli import app

CONFIG = """
[data]
source = "digits"
partition = "dirichlet"
alpha = 1.0
clients = 4
rows = 40
max_validation = 20
max_test = 30

[model]
backbone = "random-vit"

[adapter]
targets = ["q_proj", "v_proj"]

[train]
lr = 0.01

[plan]
rounds = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "digits.toml"
    path.write_text(CONFIG)
    return path


def celora(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def test_a_run_leaves_its_folder_its_summary_and_an_adapter_for_every_client(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    code, stdout, stderr = celora("run", config, "--out", out)
    assert code == 0, stderr
    assert "client-00" in stdout and str(out / "adapters") in stdout.replace("\n", "")
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "config.toml", "manifest.json", "events.jsonl", "metrics.csv", "bytes.csv", "similarity", "state", "adapters",
        "report.html", "summary.json", "local",
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["algorithm"] == "ce-lora"
    assert set(summary["metrics"]) == {"mean", "weighted_mean", "worst_decile", "std", "lift_mean", "harmed"}
    assert set(summary["clients"]) == {f"client-0{i}" for i in range(4)}
    twin = json.loads((out / "local" / "summary.json").read_text())
    for client, row in summary["clients"].items():
        assert row["train"] == 40
        assert row["local_only"] == twin["clients"][client]["score"]
        assert row["lift"] == pytest.approx(row["score"] - row["local_only"])
        assert (out / "adapters" / client / "adapter_model.safetensors").exists()
    size, modules = summary["bytes"], 4
    assert size["up_payload"] == modules * 64 * 4
    assert size["head"] == 0
    assert size["up_frame"] > size["up_payload"]
    assert size["total"]["up_payload"] == 4 * 2 * modules * 64 * 4
    weights = np.load(out / "similarity" / "round_0002.npy")
    np.testing.assert_allclose(weights.sum(1), 1)
    with open(out / "bytes.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["up_frame"]) for row in rows) == size["total"]["up_frame"]
    rounds = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["index"] for event in rounds if event["event"] == "round"] == [1, 2, 3]


def test_comparing_writes_a_list_of_summaries_with_local_first(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    code, stdout, stderr = celora(
        "compare", config, "--algorithms", "fedit,ffa-lora,fedsa-lora", "--out", out, "--json"
    )
    assert code == 0, stderr
    summaries = json.loads(stdout)
    assert summaries == json.loads((out / "compare.json").read_text())
    assert [summary["algorithm"] for summary in summaries] == ["local", "fedit", "ffa-lora", "fedsa-lora"]
    up = {summary["algorithm"]: summary["bytes"]["up_payload"] for summary in summaries}
    pair = 4 * 8 * 64 * 4
    assert up == {"local": 0, "fedit": 2 * pair, "ffa-lora": pair, "fedsa-lora": pair}
    head = {summary["algorithm"]: summary["bytes"]["head"] for summary in summaries}
    assert head == {"local": 0, "fedit": 10 * 65 * 4, "ffa-lora": 10 * 65 * 4, "fedsa-lora": 0}


def test_matched_budgets_send_equally_much_and_are_resumed_with_the_same_ranks(config: Path, tmp_path: Path) -> None:
    """FedIT at rank 8: 4 matrices of 64 × 64, 4 · 8 · 128 numbers; a core of as many is 32 × 32."""
    out = tmp_path / "matched"
    words = ("compare", config, "--algorithms", "fedit,ffa-lora,ce-lora", "--match", "floats", "--out", out)
    code, stdout, stderr = celora(*words, "--json")
    assert code == 0, stderr
    summaries = {summary["algorithm"]: summary for summary in json.loads(stdout)}
    ranks = {name: summary["uplink"]["rank"] for name, summary in summaries.items()}
    assert ranks == {"local": 8, "fedit": 8, "ffa-lora": 16, "ce-lora": 32}
    for name, summary in summaries.items():
        sent = 0 if name == "local" else 4 * 8 * 128
        assert summary["uplink"] == {"match": "floats", "rank": ranks[name], "floats": sent, "budget": 4 * 8 * 128}
        assert summary["bytes"]["up_payload"] == 4 * sent
        assert summary["settings"]["adapter"]["rank"] == ranks[name]
    assert any("at rank 32 a client of ce-lora sends 4,096" in notice for notice in summaries["ce-lora"]["notices"])

    for name in ("summary.json", "events.jsonl"):
        (out / "ce-lora" / name).unlink()
    for state in (out / "ce-lora" / "state").glob("round_*"):
        shutil.rmtree(state)
    code, stdout, stderr = celora("resume", out)
    assert code == 0, stderr
    assert "numbers" in stdout and "4,096" in stdout
    again = json.loads((out / "compare.json").read_text())[-1]
    for key in ("metrics", "clients", "uplink", "bytes", "settings"):
        assert again[key] == summaries["ce-lora"][key]

    code, _, stderr = celora("compare", config, "--algorithms", "fedit", "--match", "bytes", "--out", tmp_path / "no")
    assert code == 2
    assert "--match: found 'bytes', expected 'rank'" in stderr
    assert not (tmp_path / "no").exists()


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(config: Path, tmp_path: Path) -> None:
    def metrics(name: str, seed: int) -> object:
        code, stdout, stderr = celora("run", config, "--out", tmp_path / name, "--json", "--set", f"plan.seed={seed}")
        assert code == 0, stderr
        summary = json.loads(stdout)
        return {key: summary[key] for key in ("metrics", "moments", "clients", "bytes")}

    one, two, other = metrics("one", 0), metrics("two", 0), metrics("three", 1)
    assert one == two
    assert one != other


def test_a_label_of_the_overrides_is_an_algorithm_with_other_settings(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG + '\n[overrides.reset.algorithm]\nname = "ce-lora"\nrule = "reset"\n')
    out = tmp_path / "labels"
    code, stdout, stderr = celora("compare", config, "--algorithms", "ce-lora,reset", "--out", out, "--json")
    assert code == 0, stderr
    rules = [summary["settings"]["algorithm"].get("rule") for summary in json.loads(stdout)]
    assert rules == [None, "similarity", "reset"]


def test_a_label_with_filters_sends_less(config: Path, tmp_path: Path) -> None:
    config.write_text(
        CONFIG + '\n[overrides.coarse.algorithm]\nname = "fedit"\n'
        '[[overrides.coarse.filters]]\nname = "quantise"\nbits = 4\n'
    )
    out = tmp_path / "labels"
    code, stdout, stderr = celora("compare", config, "--algorithms", "fedit,coarse", "--out", out, "--json")
    assert code == 0, stderr
    _, plain, coarse = json.loads(stdout)
    assert "filters" not in plain["settings"] and coarse["settings"]["filters"] == [{"name": "quantise", "bits": 4}]
    assert 7 < plain["bytes"]["up_payload"] / coarse["bytes"]["up_payload"] <= 8
    assert plain["bytes"]["down_payload"] == coarse["bytes"]["down_payload"]


def test_a_run_with_filters_that_was_stopped_ends_as_one_that_was_not(config: Path, tmp_path: Path) -> None:
    config.write_text(
        CONFIG + '[algorithm]\nname = "fedit"\n[engine]\nstate_mb = 0\n'
        '[[filters]]\nname = "clip"\nnorm = 0.5\n[[filters]]\nname = "quantise"\nbits = 4\n'
    )
    for _ in experiment.run(experiment.read(config), tmp_path / "whole", twin=False):
        pass
    stopped = experiment.run(experiment.read(config), tmp_path / "stopped", twin=False)
    assert any(event["event"] == "round" for event in stopped)
    stopped.close()
    code, _, stderr = celora("resume", tmp_path / "stopped", "--quiet")
    assert code == 0, stderr
    whole, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "stopped"))
    assert [resumed[key] for key in ("metrics", "clients", "bytes")] == [
        whole[key] for key in ("metrics", "clients", "bytes")
    ]


def test_resuming_a_finished_run_changes_nothing(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "one"
    celora("run", config, "--out", out, "--quiet")
    before = (out / "summary.json").read_text()
    code, _, stderr = celora("resume", out, "--quiet")
    assert code == 0, stderr
    assert (out / "summary.json").read_text() == before


def test_secret_bases_give_every_client_an_a_of_its_own(config: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def rows_of_a(*sets: str) -> torch.Tensor:
        out = tmp_path / f"run{len(sets)}"
        code, _, stderr = celora("run", config, "--out", out, "--quiet", *sets)
        assert code == 0, stderr
        files = sorted((out / "adapters").glob("*/adapter_model.safetensors"))
        name = next(key for key in load_file(files[0]) if "lora_A" in key)
        a = torch.stack([load_file(file)[name].flatten() for file in files])
        return torch.corrcoef(a)[0, 1:].abs().max()

    assert rows_of_a() > 0.5
    assert rows_of_a("--set", "adapter.bases=secret") < 0.3


def scores(folder: Path) -> list[list[str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def test_clients_that_share_passes_end_where_they_end_alone(config: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert celora("run", config, "--group", 1, "--out", alone)[0] == 0
    assert celora("run", config, "--out", together)[0] == 0
    assert len(scores(alone)) == len(scores(together)) > 0
    for one, other in zip(scores(alone), scores(together), strict=True):
        assert one[:3] == other[:3]
        assert [float(n or 0) for n in one[3:]] == pytest.approx([float(n or 0) for n in other[3:]], abs=1e-3)
    settings = [json.loads((folder / "summary.json").read_text())["settings"]["engine"] for folder in (alone, together)]
    assert [engine.get("group") for engine in settings] == [1, None]


def test_a_run_of_the_top_layer_is_the_same_with_kept_prefixes_and_without(config: Path, tmp_path: Path) -> None:
    kept, computed = tmp_path / "kept", tmp_path / "computed"
    top = ("--set", "adapter.layers=last:1")
    assert celora("run", config, *top, "--out", kept)[0] == 0
    assert celora("run", config, *top, "--set", "engine.cache_mb=0", "--out", computed)[0] == 0
    assert (kept / "metrics.csv").read_bytes() == (computed / "metrics.csv").read_bytes()
    for adapter in sorted(kept.glob("adapters/*/adapter_model.safetensors")):
        assert adapter.read_bytes() == (computed / adapter.relative_to(kept)).read_bytes()
    described = json.loads((kept / "adapters" / "client-00" / "adapter_config.json").read_text())
    assert all(".1." in name for name in described["target_modules"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--group", "0"), "engine.group: found 0, expected greater than or equal to 1"),
        (("--set", "adapter.layers=first:2"), "adapter.layers: found 'first:2'"),
        (("--set", "adapter.layers=last:7"), 'adapter.layers = "last:7": random-vit has 2 layers'),
        (("--set", "engine.cache_mb=-1"), "engine.cache_mb: found -1, expected greater than or equal to 0"),
    ],
)
def test_settings_of_the_engine_that_cannot_be(
    words: tuple[str, ...], message: str, config: Path, tmp_path: Path
) -> None:
    code, _, stderr = celora("run", config, *words, "--out", tmp_path / "none")
    assert code != 0
    assert message in stderr.replace("\n", " ")
    assert not (tmp_path / "none").exists()
