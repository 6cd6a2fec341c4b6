"""Gradient checkpointing: the same bits with fewer of them in memory, alone, grouped, with dropout and on `last:n`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit, Gradient
from celora.models.backbone import Backbone, load
from celora.models.learner import ModelLearner
from celora.models.settings import Adapter, Model
from celora.tensors import but
from tests.classifier import forward, initial
from tests.classifier import rows as rows_of
from tests.large import TARGETS, batch, loaded, saved, start, stepped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("large"))


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("layers", ["all", "last:1"])
@pytest.mark.parametrize("clients", [0, 2])
def test_losses_and_gradients_are_the_same_bits(family: str, layers: str, clients: int, folder: Path) -> None:
    plain, again = (loaded(folder, family, layers=layers, gradient_checkpointing=on) for on in (False, True))
    weights = start(plain, clients)
    assert equal(stepped(again, weights), stepped(plain, weights))


@pytest.mark.parametrize("family", TARGETS)
def test_what_drops_out_drops_out_again(family: str, folder: Path) -> None:
    plain, again = (loaded(folder, family, dropout=True, gradient_checkpointing=on) for on in (False, True))
    weights, state = start(plain), torch.random.get_rng_state()
    once = stepped(plain, weights, dropout_seed=3, rate=0.2)
    assert equal(stepped(again, weights, dropout_seed=3, rate=0.2), once)
    assert not equal(stepped(again, weights, dropout_seed=4, rate=0.2), once)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in again._transformer.modules())


@pytest.mark.parametrize("family", TARGETS)
def test_less_is_kept_for_going_back(family: str, folder: Path) -> None:
    def kept(on: bool) -> int:
        backbone, found = loaded(folder, family, gradient_checkpointing=on), 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal found
            found += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stepped(backbone, start(backbone))
        return found

    assert kept(True) < 0.5 * kept(False)


def test_layers_are_as_they_were_when_a_pass_has_ended(folder: Path) -> None:
    backbone = loaded(folder, "llama", gradient_checkpointing=True)
    stepped(backbone, start(backbone))
    assert not any("forward" in vars(layer) for layer in backbone.layers)
    with torch.no_grad():
        assert torch.equal(backbone.encode(batch(backbone), {}), loaded(folder, "llama").encode(batch(backbone), {}))


def learners(backbone: Backbone) -> list[ModelLearner]:
    """Three clients of six texts of unlike length."""
    passes, found = forward(backbone, Lora()), list[ModelLearner]()
    weights = initial(backbone, Adapter(rank=2), Lora(), 2, seed=0)
    for client in range(3):
        ids = [[1000 + 7 * client + at] * (3 + 5 * at) for at in range(6)]
        rows = rows_of(ids, torch.arange(6) % 2, 6 * client)
        recipe = Recipe(batch_size=3, steps=3, lr=1e-2)
        found.append(ModelLearner(passes, {"train": rows}, weights, recipe, seed=0, client=str(client), round=1))
    return found


@pytest.mark.parametrize("together", [False, True])
def test_clients_train_to_the_same_bits_alone_and_together(together: bool) -> None:
    def fitted(on: bool) -> Any:
        asked = [(one, Fit({}, but())) for one in learners(minilm(on))]
        if together:
            return Fit.together(asked, asked[0][0].shared)
        return [problem.alone(learner) for learner, problem in asked]

    for plain, again in zip(fitted(False), fitted(True), strict=True):
        assert plain.metrics == again.metrics
        assert all(torch.equal(weight, again.weights[name]) for name, weight in plain.weights.items())


def minilm(on: bool) -> Backbone:
    return load(Model(device="cpu", gradient_checkpointing=on), Adapter(rank=2, layers="last:2"), Path())


def test_second_derivatives_are_the_same_bits() -> None:
    def along(on: bool) -> dict[str, torch.Tensor]:
        learner = learners(minilm(on))[0]
        weights = {name: weight + 0.01 for name, weight in learner.initial.items()}
        problem = Gradient(weights, next(learner.batches()), but(), along=weights)
        return problem.alone(learner).gradient

    plain, again = along(False), along(True)
    assert any(bool(one.abs().max() > 0) for one in plain.values())
    assert all(torch.equal(one, again[name]) for name, one in plain.items())
