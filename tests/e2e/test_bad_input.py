"""Each mistake a user can make, made: the message says what was found, what was expected and what to do."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from celora.cli import app
from tests.e2e.test_runs import CONFIG

TEXTS = ["the card was lost", "my card did not arrive", "where is my money", "transfer the money today"]


def celora(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stderr


def table(path: Path, rows: int, label: str = "label", names: tuple[str, ...] = ("card", "money")) -> None:
    lines = [f"text,{label}", *(f"{TEXTS[i % 4]} {i},{names[i % len(names)]}" for i in range(rows))]
    path.write_text("\n".join(lines) + "\n")


def config(folder: Path, source: str, more: str = "") -> Path:
    path = folder / "exp.toml"
    path.write_text(f'[data]\nsource = "{source}"\n{more}\n[plan]\nrounds = 1\n')
    return path


def test_unknown_keys_and_bad_values_are_told_all_at_once_with_what_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text('[adapter]\nrnak = 8\n[train]\nlr = -1\n[algorithm]\nname = "celora"\n[plam]\nrounds = 3\n')
    code, stderr = celora("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert "exp.toml: adapter.rnak: unknown key. Did you mean 'rank'?" in stderr
    assert "train.lr: found -1, expected greater than 0" in stderr
    assert "algorithm.name: found 'celora', expected one of 'local', 'fedit'" in stderr
    assert "Did you mean 'ce-lora'?" in stderr
    assert "plam: unknown key. Did you mean 'plan'?" in stderr
    assert "4 problems. Nothing was run." in stderr
    assert not (tmp_path / "run").exists()


def test_settings_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text('[adapter]\nbases = "secret"\n[algorithm]\nname = "fedit"\n')
    code, stderr = celora("run", path)
    assert code == 2
    assert "adapter.bases: found 'secret', but fedit needs the same A at every client" in stderr
    sets = ("adapter.bases=shared", "algorithm.name=ce-lora", "algorithm.freeze_bases=true")
    code, stderr = celora("run", path, *(word for change in sets for word in ("--set", change)))
    assert code == 2
    assert "expected adapter.init = 'orthonormal'" in stderr


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    table(tmp_path / "bank.csv", 40, label="labels")
    code, stderr = celora("run", config(tmp_path, "bank.csv"), "--out", tmp_path / "run")
    assert code == 2
    assert "'label'" in stderr and "labels" in stderr and "Did you mean" in stderr


def test_a_label_seen_only_in_test_is_named_with_its_first_row(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", 40)
    table(tmp_path / "test.csv", 12, names=("card", "money", "loan"))
    code, stderr = celora(
        "run", config(tmp_path, "train.csv", 'test = "test.csv"\nclients = 2'), "--out", tmp_path / "run"
    )
    assert code == 2
    assert "'loan'" in stderr and "test.csv" in stderr and "train" in stderr


def test_an_empty_client_is_left_out_and_told(tmp_path: Path) -> None:
    for name, rows in (("a", 30), ("b", 30), ("c", 0)):
        table(tmp_path / f"site-{name}.csv", rows)
    out = tmp_path / "run"
    code, stderr = celora("run", config(tmp_path, "site-*.csv"), "--out", out)
    assert code == 0, stderr
    assert "site-c is left out" in stderr
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["clients"]) == {"site-a", "site-b"}
    assert "site-c" in summary["excluded"]


def test_targets_that_match_nothing_are_answered_with_what_would_have_matched(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text(CONFIG.replace("q_proj", "querry").replace(', "v_proj"', ""))
    code, stderr = celora("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert "querry" in stderr and "matches 0 modules" in stderr and "q_proj (2)" in stderr
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    path, out = tmp_path / "exp.toml", tmp_path / "run"
    path.write_text(CONFIG)
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    code, stderr = celora("run", path, "--out", out)
    assert code == 2
    assert "exists already" in stderr and "celora resume" in stderr
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was cut off before its summary was written."""
    path, out = tmp_path / "exp.toml", tmp_path / "run"
    path.write_text(CONFIG)
    code, stderr = celora("run", path, "--out", out, "--quiet")
    assert code == 0, stderr
    (out / "summary.json").rename(tmp_path / "expected.json")
    return out


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_told(stopped: Path, tmp_path: Path) -> None:
    newest = sorted((stopped / "state").glob("round_*"))[-1]
    server = newest / "server.bin"
    server.write_bytes(server.read_bytes()[:-20])
    code, stderr = celora("resume", stopped)
    assert code == 0, stderr
    assert f"{newest.name} is damaged (the frame is truncated" in stderr.replace("\n", " ")
    expected = json.loads((tmp_path / "expected.json").read_text())
    found = json.loads((stopped / "summary.json").read_text())
    assert found["metrics"] == expected["metrics"]
    assert found["bytes"] == expected["bytes"]


def test_where_no_checkpoint_is_whole_nothing_is_guessed(stopped: Path) -> None:
    for server in (stopped / "state").glob("round_*/server.bin"):
        raw = bytearray(server.read_bytes())
        raw[len(raw) // 2] ^= 1
        server.write_bytes(raw)
    code, stderr = celora("resume", stopped)
    assert code == 2
    assert "damaged" in stderr and "No whole checkpoint is left" in stderr


def test_what_is_no_run_folder_cannot_be_resumed(tmp_path: Path) -> None:
    code, stderr = celora("resume", tmp_path)
    assert code == 2
    assert "is not a run folder" in stderr


def test_a_quorum_that_can_never_be_reached_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text(CONFIG + "quorum = 9\n")
    code, stderr = celora("run", path, "--out", tmp_path / "run")
    assert code == 2
    assert "plan.quorum: found 9, but only 4 clients train in a round" in stderr
    assert not (tmp_path / "run").exists()


def test_what_an_algorithm_needs_is_missed_before_its_twin_is_trained(tmp_path: Path) -> None:
    """A key that is not there, more heads than there are directions: told before a folder is made."""
    table(tmp_path / "a.csv", 40)
    for name, more, says in (
        ("she-lora", 'key = "missing.key"', "she-lora: key: cannot read missing.key"),
        ("ravan", "heads = 200", "1600 orthonormal directions of 384 dimensions"),
    ):
        path = config(tmp_path, "a.csv", f'clients = 2\n[algorithm]\nname = "{name}"\n{more}')
        code, stderr = celora("run", path, "--out", tmp_path / "run")
        assert code == 2
        assert says in stderr
        assert not (tmp_path / "run").exists()
