"""celora.experiment.exports and `celora export`: which models are written where, and what is said of it."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from celora import cli, experiment
from celora.errors import ConfigError, ModelError, RunFolderError
from celora.experiment.exports import ClientExport, closing, export, serve
from celora.experiment.trained import load
from celora.models.export import Exported
from tests.language import saved
from tests.unit.test_trained import DIGITS, images, trained

ROW = {"prompt": "ab", "completion": "b"}


def run(*words: Any) -> Result:
    return CliRunner().invoke(cli.app, ["export", *map(str, words)])


def language_run(tmp_path: Path) -> Path:
    saved(tmp_path / "base")
    for site in ("a", "b"):
        rows = [json.dumps({**ROW, "prompt": site * at}) for at in range(1, 9)]
        (tmp_path / f"{site}.jsonl").write_text("\n".join(rows))
    tree = {
        "data": {"source": "*.jsonl"}, "task": {"name": "causal-lm"}, "model": {"backbone": "base", "device": "cpu"},
        "adapter": {"rank": 9, "scaling": "rslora", "alpha": 6.0}, "plan": {"rounds": 1}, "train": {"steps": 1},
        "algorithm": {"name": "local"},
    }  # fmt: skip
    list(experiment.run(experiment.resolve(tree, tmp_path), tmp_path / "run"))
    return tmp_path / "run"


def test_every_clients_adapter_of_a_language_model_is_served_by_one_command(tmp_path: Path) -> None:
    folder = language_run(tmp_path)
    ended = run(folder)
    assert ended.exit_code == 0, ended.output
    out = folder / "exports" / "peft"
    command = (
        f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 16 --lora-modules a={out / 'a'} b={out / 'b'}"
    )
    assert ended.stdout.splitlines() == [
        f"a  {out / 'a'}  (plain LoRA of rank 16 on {tmp_path / 'base'})",
        f"b  {out / 'b'}  (plain LoRA of rank 16 on {tmp_path / 'base'})",
        "the README.md in each says how to load it",
        command,
    ]
    config = json.loads((out / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, pytest.approx(8.0), True)  # 6 / 3 · 4
    ended = run(folder, "--client", "b", "--format", "merged", "--out", tmp_path / "whole", "--json")
    (found,) = json.loads(ended.stdout)
    whole = tmp_path / "whole" / "b"
    said = {"client": "b", "folder": str(whole), "kind": "merged", "base": None, "rank": None}
    assert found == {**said, "serve": f"vllm serve {whole}"}
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["b"]


def test_a_model_is_exported_from_python_as_from_the_command_line(tmp_path: Path) -> None:
    folder = trained(tmp_path, "ce-lora")
    of = load(folder)
    written = of["client-01"].export(tmp_path / "out")
    (other,) = export(folder, "client-01", "peft", tmp_path / "all")
    assert (written.kind, written.rank, written.base) == ("peft", 8, str(tmp_path / "out" / "backbone"))
    weights = [where / "adapter_model.safetensors" for where in (written.folder, other.what.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert serve([other]) is None


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("fedalt", "celora", "an adapter that is no matrix: only celora reads it"),
        pytest.param(
            "pfedlora",
            "own",
            "a whole model of the client's own, with the adapter beside it: only celora reads it",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_only_celora_reads_is_exported_as_it_is_and_not_merged(
    name: str, kind: str, said: str, tmp_path: Path
) -> None:
    tree = tomllib.loads(DIGITS.format(name=name))
    if kind == "own":
        rows = [f"{'good' if at % 2 else 'bad'} {at},{at % 2}" for at in range(20)]
        (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
        tree |= {"model": {"own": ["minilm:1", "minilm:2"], "device": "cpu"}, "adapter": {"rank": 2}}
        tree["data"] = {"source": "rows.csv", "clients": 2, "partition": "iid"}
    list(experiment.run(experiment.resolve(tree, tmp_path), tmp_path / "run", twin=False))
    folder = tmp_path / "run"
    ended = run(folder, "--client", "client-01")
    assert ended.stdout.splitlines()[0].endswith(f"({said})")
    (one,) = export(folder, "client-01", "peft", tmp_path / "out")
    assert one.what.kind == kind
    of = load(folder)
    given = ["good 3", "bad"] if kind == "own" else images(of, "client-01")
    before = of["client-01"].outputs(given)
    shutil.rmtree(folder / "adapters" / "client-01")
    shutil.copytree(one.what.folder, folder / "adapters" / "client-01")
    assert of["client-01"].outputs(given).equal(before)
    with pytest.raises(ModelError, match="choose the format peft, which writes"):
        list(export(folder, "client-01", "merged", tmp_path / "out"))


def test_what_is_asked_for_and_is_not_there_is_named(tmp_path: Path) -> None:
    folder = trained(tmp_path, "local")
    with pytest.raises(ConfigError, match="--client: found 'nobody', expected all or one of client-00, client-01"):
        list(export(folder, "nobody", "peft", None))
    with pytest.raises(ConfigError, match="--format: found 'gguf', expected peft or merged"):
        list(export(folder, "all", "gguf", None))
    assert run(folder, "--client", "nobody").exit_code == 2
    shutil.rmtree(folder / "adapters" / "client-01")
    assert [one.client for one in export(folder, "client-00", "peft", None)] == ["client-00"]
    with pytest.raises(RunFolderError, match=r"the run has kept no adapter of client-01; .* celora resume") as why:
        list(export(folder, "all", "peft", None))
    (folder / "summary.json").unlink()  # as the message says
    assert str(folder / "summary.json") in str(why.value)
    list(experiment.resume(folder))
    assert len(list(export(folder, "all", "peft", None))) == 2


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    folder, out = trained(tmp_path, "local"), tmp_path / "mine"
    (out / "client-00").mkdir(parents=True)
    model = load(folder)["client-00"]
    model.export(out / "client-00")  # an empty folder
    model.export(out / "client-00", "merged")
    assert not (out / "client-00" / "adapter_config.json").exists()
    (out / "client-01").mkdir()
    (out / "client-01" / "notes.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"client-01 exists and is no earlier export .*: choose another --out"):
        list(export(folder, "all", "peft", out))
    assert (out / "client-01" / "notes.txt").read_text() == "years of work"


def test_a_runs_own_adapters_are_not_replaced(tmp_path: Path) -> None:
    folder = trained(tmp_path, "local")
    own = folder / "adapters"
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    for out in (own, own / "more"):
        with pytest.raises(RunFolderError, match=r"where a run keeps its own adapters: choose another --out"):
            list(export(folder, "all", "merged", out))
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_runs_of_older_versions_are_exported_by_the_names_of_their_classes(tmp_path: Path) -> None:
    """Before celora kept the agreement, and when it packed it as another record."""
    folder = trained(tmp_path, "fedit")
    now = load(folder)["client-00"].outputs(images(load(folder), "client-00"))
    written = json.loads((folder / "manifest.json").read_text())
    for agreement in ({}, {"agreement": b"a record that is no more".hex()}):
        older = {name: value for name, value in written.items() if name != "agreement"} | agreement
        (folder / "manifest.json").write_text(json.dumps(older))
        assert load(folder)["client-00"].outputs(images(load(folder), "client-00")).equal(now)
        assert len(list(export(folder, "all", "peft", None))) == 2


def test_a_rank_that_vllm_does_not_serve_is_said(tmp_path: Path) -> None:
    big = ClientExport("a", Exported(tmp_path, "peft", base="base", rank=600, generates=True))
    assert serve([big]) is None
    assert list(closing([big]))[-1] == "vLLM serves ranks up to 512, and here is a larger one: use --format merged"


def test_a_disk_that_fills_up_is_told_and_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path, "local")
    (one,) = export(folder, "client-01", "peft", tmp_path / "out")
    before = {path: path.read_bytes() for path in one.what.folder.rglob("*") if path.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("celora.models.export.save_file", full)
    with pytest.raises(RunFolderError, match="No space left on device; an earlier export there is whole"):
        list(export(folder, "client-01", "peft", tmp_path / "out"))
    assert {path: path.read_bytes() for path in one.what.folder.rglob("*") if path.is_file()} == before
