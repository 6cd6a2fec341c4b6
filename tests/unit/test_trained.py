"""celora.experiment.trained: a finished run gives back each client's model, which answers as it did in the run."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import celora
from celora import experiment
from celora.errors import RunFolderError
from celora.experiment.population import ResourceCache
from celora.experiment.trained import TrainedRun, load

DIGITS = """
[data]
source = "digits"
clients = 2
rows = 16
max_validation = 8
max_test = 12
[model]
backbone = "random-vit"
device = "cpu"
[adapter]
rank = 2
targets = ["q_proj", "v_proj"]
[train]
lr = 1e-2
epochs = 4
[plan]
rounds = 1
[algorithm]
name = "{name}"
"""


def trained(tmp_path: Path, name: str, **adapter: Any) -> Path:
    tree = tomllib.loads(DIGITS.format(name=name))
    asked = experiment.resolve({**tree, "adapter": {**tree["adapter"], **adapter}}, tmp_path)
    list(experiment.run(asked, tmp_path / "run", twin=False))
    return tmp_path / "run"


def images(run: TrainedRun, client: str) -> Tensor:
    """The images of a client's test rows."""
    inputs: Any = run.data.table.inputs
    return torch.stack([inputs[row] for row in run.data.clients[client].test])


PATTERNS = {"rank_pattern": {"1.*q_proj": 3}, "alpha_pattern": {"v_proj": 9.0}}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("fedit", {}),
        ("ce-lora", {}),
        ("flora", {}),  # something merged
        ("fedalt", {}),  # a gate
        ("fedit", {"init": "pissa", "dropout": 0.5, **PATTERNS}),
        ("fedalt", PATTERNS),
    ],
)
def test_predictions_have_the_score_of_the_summary(name: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    run = load(str(trained(tmp_path, name, **adapter)))
    for client, model in run.items():
        at = run.data.clients[client].test
        answers = model.predict(images(run, client))
        right = [answer == run.data.table.labels[row] for answer, row in zip(answers, at, strict=True)]
        assert sum(right) / len(at) == pytest.approx(model.score)
    assert sorted(run) == sorted(run.data.clients)


@pytest.mark.parametrize("adapter", [{}, {"bases": "secret"}, {"init": "pissa"}])
def test_before_training_all_clients_have_the_frozen_model_and_the_head_as_it_was_drawn(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    run = load(trained(tmp_path, "local", **adapter))
    population = ResourceCache().population(run.experiment)
    for client, model in run.items():
        inputs = images(run, client)
        start = population.models.predict(client, population.start(client), inputs)
        before = model.outputs(inputs, trained=False)
        assert torch.allclose(before, start, atol=1e-5)
        assert not torch.allclose(before, model.outputs(inputs), atol=1e-2)
        assert model.predict(inputs, trained=False) == run.task.answers(before)


def test_the_package_offers_what_users_call(tmp_path: Path) -> None:
    written = celora.read(DIGITS.format(name="fedit"))
    events = list(celora.run(written, tmp_path / "run", twin=False))
    assert events[-1]["event"] == "session_end"
    assert list(celora.resume(tmp_path / "run"))[-1]["summaries"] == events[-1]["summaries"]
    assert sorted(celora.load(tmp_path / "run")) == ["client-00", "client-01"]
    assert {name for name in celora.__all__ if not hasattr(celora, name)} == set()


def test_a_run_that_moved_still_predicts(tmp_path: Path) -> None:
    folder = trained(tmp_path, "fedit")
    before = load(folder)["client-00"].outputs(torch.ones(1, 1, 8, 8))
    moved = folder.rename(tmp_path / "elsewhere")
    assert torch.equal(load(moved)["client-00"].outputs(torch.ones(1, 1, 8, 8)), before)


def test_what_is_no_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"found no summary.json, expected the folder of a run that has finished"):
        load(tmp_path)
    folder = trained(tmp_path, "fedit")
    with pytest.raises(RunFolderError, match=r"found no summary.json, expected one of its folders run"):
        load(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["agreement"], manifest["classes"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunFolderError, match="written by an older celora"):
        load(folder)


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    folder = trained(tmp_path, "fedit")
    (folder / "adapters" / "client-00" / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(RunFolderError, match=r"adapter_model\.safetensors is damaged"):
        load(folder)["client-00"].predict(torch.ones(1, 1, 8, 8))


def test_outputs_are_those_of_the_head(tmp_path: Path) -> None:
    run = load(trained(tmp_path, "fedit"))
    outputs: Tensor = run["client-01"].outputs(torch.rand(3, 1, 8, 8))
    assert outputs.shape == (3, 10)
    assert run["client-01"].predict(torch.rand(0, 1, 8, 8)) == []
