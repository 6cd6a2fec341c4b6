"""pFedLoRA (methods.md 2; part V, 6): phases that leave the other half alone to the bit, five networks, one adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from celora.algorithms.pfedlora import PFedLoRA
from celora.core.learner import Recipe
from celora.core.training import Fitted
from celora.models.learner import ModelLearner
from celora.models.model_zoo import ModelZoo, private_models
from celora.models.private_model import CNNS, PrivateModel, PrivateNetwork
from celora.models.settings import Adapter, Model
from celora.tensors import part
from tests.classifier import rows as rows_of
from tests.classifier import task
from tests.facts.payloads import rounds
from tests.toy import Population, image

ADAPTER, FAMILY = Adapter(rank=4), PFedLoRA().family


def zoo_of(models: list[PrivateModel], classes: int) -> ModelZoo:
    """A client for each network, named like it."""
    return ModelZoo(models, task(classes), adapter=ADAPTER, family=FAMILY, seed=0, clients=tuple(CNNS))


def learner_of(models: list[PrivateModel], name: str) -> ModelLearner:
    draw, zoo = torch.Generator().manual_seed(list(CNNS).index(name)), zoo_of(models, 2)
    rows = rows_of(torch.rand(12, 3, 32, 32, generator=draw), torch.arange(12) % 2)
    start = zoo.start(name, lambda: 0)
    return zoo.learner(name, 1, {"train": rows, "validation": rows}, start, Recipe(batch_size=4))


@pytest.fixture(scope="module")
def models() -> list[PrivateModel]:
    return private_models(Model(own=tuple(CNNS), device="cpu"), Path(), seed=0)


def halves(weights: Any) -> tuple[Any, Any]:
    adapter = {name: w for name, w in weights.items() if part(name) in ("A", "B")}
    return adapter, {name: w for name, w in weights.items() if name not in adapter}


@pytest.mark.parametrize("mix", ["loss", "logit"])
@pytest.mark.parametrize("where", ["cnn-1", "cnn-5", "toy"])
def test_each_phase_leaves_the_frozen_half_unchanged_to_the_bit(
    models: list[PrivateModel], where: str, mix: Any
) -> None:
    algorithm = PFedLoRA(mix=mix)
    learner: Any = Population(algorithm.family)("c0", 1) if where == "toy" else learner_of(models, where)
    steps = algorithm.train(learner, algorithm.client_init(learner), algorithm.send(algorithm.server_init({}, ()), "a"))
    first = next(steps)
    one: Fitted = first.alone(learner)
    second = steps.send(one)
    two: Fitted = second.alone(learner)
    (theta0, w0), (theta1, w1), (theta2, w2) = (halves(f) for f in (first.weights, one.weights, two.weights))
    assert image(theta1) == image(theta0)
    assert image(w2) == image(w1)
    assert all(not torch.equal(w1[name], w) for name, w in w0.items())
    assert any(not torch.equal(theta2[name], w) for name, w in theta1.items())


def test_the_five_networks_are_as_large_as_the_papers_and_share_one_adapter(models: list[PrivateModel]) -> None:
    """Megabytes of float32 without the head; the digest says about 10.0, 6.9, 5.0, 3.8 and 2.6."""
    found = [sum(w.numel() for w in one.start.values()) * 4 / 1e6 for one in models]
    assert found == pytest.approx([10.5, 7.2, 5.3, 4.2, 2.7], abs=0.05)
    assert [round(mb / want, 1) for mb, want in zip(found, (10.0, 6.9, 5.0, 3.8, 2.6), strict=True)] == [
        1.0,
        1.0,
        1.1,
        1.1,
        1.0,
    ]
    adapter = zoo_of(models, 10).initial
    assert {name: tuple(w.shape) for name, w in adapter.items()} == {
        "fc.A": (4, 500), "fc.B": (10, 4), "head.weight": (10, 500), "head.bias": (10,),
    }  # fmt: skip
    assert not adapter["fc.B"].any()


def test_only_the_adapter_travels() -> None:
    """12 matrices at r = 8 and d = 384: r (d + k) numbers each. An own model has one, of (classes, 500)."""
    traffic = rounds(PFedLoRA())[1].traffic["a"]
    size = 12 * int(PFedLoRA.info.floats(8, 384, 384)) * 4
    assert (traffic.up_payload, traffic.down_payload, traffic.head_up) == (size, size, 0)


def test_on_models_of_ones_own_joint_and_local_predictions_differ_by_the_adapter(models: list[PrivateModel]) -> None:
    start, learner = zoo_of(models, 3).start("cnn-5", lambda: 0), learner_of(models, "cnn-5")
    network, batch = PrivateNetwork(models[4], FAMILY, 2.0), next(learner.batches())
    z = network.features(start, batch)
    moved = {**start, "fc.B": torch.ones(3, 4)}
    difference = network.outputs(task(3), moved, batch) - network.outputs(task(3), start, batch)
    torch.testing.assert_close(difference, 2.0 * z @ start["fc.A"].T @ torch.ones(4, 3))
