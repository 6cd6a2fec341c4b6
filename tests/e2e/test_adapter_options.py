"""The options of `[adapter]`: each runs with every algorithm, or is refused with a reason before anything is run."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from celora import experiment
from celora.algorithms import ALGORITHMS
from celora.errors import ConfigError
from celora.experiment.config import Experiment, dump
from celora.models.export import load_export
from celora.models.settings import Adapter

CONFIG = """
[data]
source = "digits"
clients = 2
rows = 16
max_validation = 8
max_test = 8
[model]
backbone = "random-vit"
device = "cpu"
[adapter]
rank = 4
alpha = 6
targets = ["q_proj", "v_proj"]
[plan]
rounds = 2
"""
OPTIONS: dict[str, Any] = {
    "scaling": "rslora",
    "alpha_pattern": {"1.*q_proj": 9.0},
    "rank_pattern": {"1.*q_proj": 2},
    "dropout": 0.2,
    "init": "pissa",
}
BASES = "cannot start from B A alone; expected 'kaiming'"
REFUSED = {
    ("flora", "dropout"): "what flora has merged into the frozen weights reads what adapters read",
    ("fedex-lora", "dropout"): "what fedex-lora has merged into the frozen weights reads what adapters read",
    ("fedalt", "dropout"): "fedalt's gate reads what its adapters read, and would drop out, too; expected 0",
    ("ce-lora", "rank_pattern"): "CKA looks at the cores of all modules at once, which must be of one size",
    ("she-lora", "rank_pattern"): "she-lora cuts what it sends to one rank for all modules; expected none",
    ("flora", "init"): "found 'pissa', but flora draws A anew, over B = 0, in every round; expected 'kaiming'",
    (
        "hetlora",
        "init",
    ): "hetlora prunes what was taken out of the frozen weights; expected 'kaiming', or algorithm.pru",
    ("fdlora", "init"): "fdlora's fusion scales B A, and with it what was taken out of the frozen weights",
    ("pfedlora", "init"): "pfedlora's own model predicts without B A, which holds what was taken out",
    ("fed-sb", "init"): BASES,
    ("ravan", "init"): BASES,
    ("fedalt", "init"): BASES,
    ("fedmosaic", "init"): BASES,
}


def asked(name: str, tree: dict[str, Any] | None = None, **adapter: Any) -> Experiment:
    written = {**tomllib.loads(CONFIG), "algorithm": {"name": name}, **(tree or {})}
    return experiment.resolve({**written, "adapter": {**written["adapter"], **adapter}}, Path())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_option_runs_with_an_algorithm_or_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    reasons = {key: says for (of, key), says in REFUSED.items() if of == name}
    for key, says in reasons.items():
        with pytest.raises(ConfigError) as found:
            asked(name, **{key: OPTIONS[key]})
        (problem,) = found.value.problems
        assert problem.startswith(f"adapter.{key}: ")
        assert says in problem
    some = {key: value for key, value in OPTIONS.items() if key not in reasons}
    events = list(experiment.run(asked(name, **some), tmp_path / "run", twin=False))
    assert events[-1]["event"] == "session_end"
    assert (tmp_path / "run" / "adapters" / "client-01").is_dir()


def test_other_settings_of_these_algorithms_allow_what_is_refused_by_default() -> None:
    asked("hetlora", {"algorithm": {"name": "hetlora", "pruning": False}}, init="pissa")
    asked("ce-lora", {"algorithm": {"name": "ce-lora", "rule": "uniform"}}, rank_pattern={"q_proj": 2})
    asked("ce-lora", {"algorithm": {"name": "ce-lora", "freeze_bases": True}}, init="pissa")


@pytest.mark.parametrize(
    ("name", "tree", "adapter", "says"),
    [
        ("ce-lora", {}, {"init": "pissa", "bases": "secret"}, "'pissa' with adapter.bases = 'secret', but what is"),
        ("flexlora", {}, {"init": "pissa", "ranks": [2, 4]}, "'pissa' with adapter.ranks, but what is left"),
        ("flexlora", {}, {"rank_pattern": {"q": 2}, "ranks": [2, 4]}, "ranks are of clients or of modules"),
        ("fedit", {"model": {"own": ["cnn-1"]}}, {"dropout": 0.1}, "model.own: one adapter stands beside the head"),
        ("fedit", {"model": {"own": ["cnn-1"]}}, {"init": "pissa"}, "model.own: needs adapter.init = 'kaiming'"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(
    name: str, tree: dict[str, Any], adapter: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as found:
        asked(name, tree, **adapter)
    assert says in str(found.value)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"init": "lora-ga"}, "adapter.init: 'lora-ga' starts from the gradient of every frozen weight"),
        ({"init": "svd"}, "adapter.init: found 'svd', expected 'kaiming', 'normal', 'orthonormal' or 'pissa'"),
        ({"dropout": 1.0}, "adapter.dropout: found 1.0, expected less than 1"),
        ({"rank_pattern": {"(": 2}}, "found the pattern '(', expected a regular expression"),
        ({"rank_pattern": {"q": 0}}, "adapter.rank_pattern.q: found 0, expected greater than or equal to 1"),
    ],
)  # fmt: skip
def test_values_that_an_option_cannot_have_are_refused(adapter: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as found:
        asked("fedit", **adapter)
    assert says in str(found.value)


def test_rslora_needs_an_alpha_that_does_not_follow_the_rank() -> None:
    with pytest.raises(ConfigError, match=r"alpha: found none, expected a number: with scaling = 'rslora'"):
        experiment.resolve({"adapter": {"scaling": "rslora"}}, Path())
    assert Adapter(rank=16, alpha=8, scaling="rslora").factor == 2.0
    assert Adapter(rank=16, alpha=8, ranks=(4, 16), scaling="rslora").factor == 2.0  # one s, whatever a client's rank


def trained(wanted: Experiment, folder: Path) -> dict[str, Tensor]:
    """The adapters and heads of all clients."""
    list(experiment.run(wanted, folder, twin=False))
    found = {client: load_export(folder / "adapters" / client)[0] for client in ("client-00", "client-01")}
    return {f"{client} {name}": weight for client, own in found.items() for name, weight in own.items()}


def test_a_run_with_all_options_is_the_same_again_from_its_own_configuration_and_one_by_one(tmp_path: Path) -> None:
    wanted = asked("fedit", **OPTIONS)
    again = experiment.read(dump(wanted))
    assert again.adapter == wanted.adapter
    one = trained(wanted, tmp_path / "one")
    others = [again, asked("fedit", {"engine": {"group": 1}}, **OPTIONS)]  # masks are a client's own
    for at, other in enumerate(others):
        two = trained(other, tmp_path / str(at))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_clients_that_start_by_pissa_share_passes(tmp_path: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "dropout"}
    together = trained(asked("fedsa-lora", **options), tmp_path / "together")
    alone = trained(asked("fedsa-lora", {"engine": {"group": 1}}, **options), tmp_path / "alone")
    for name, weight in together.items():
        torch.testing.assert_close(weight, alone[name], atol=1e-4, rtol=0)
