"""celora.models.model_zoo: clients whose whole models are their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit, Score
from celora.core.solve import solve_together
from celora.errors import ModelError
from celora.models.backbone import load
from celora.models.learner import ModelLearner
from celora.models.model_zoo import ModelZoo, private_models
from celora.models.settings import Adapter, Model
from celora.tensors import but
from tests.classifier import rows as rows_of
from tests.classifier import task

TEXTS = ["good", "a rather bad and long sentence", "fine by me", "no"]


def zoo_of(*own: str, seed: int = 0, clients: str = "abc") -> ModelZoo:
    models = private_models(Model(own=own, device="cpu"), Path(), seed)
    return ModelZoo(models, task(), adapter=Adapter(rank=2), family=Lora(), seed=seed, clients=clients)


def unknown() -> int:
    raise AssertionError("nothing of an own model is drawn from a secret")


def learner(zoo: ModelZoo, client: str, inputs: Any, **recipe: Any) -> ModelLearner:
    rows = rows_of(zoo.read(inputs), torch.arange(len(inputs)) % 2)
    return zoo.learner(client, 1, {"train": rows, "test": rows}, zoo.start(client, unknown), Recipe(**recipe))


def test_an_encoder_with_all_its_layers_gives_the_features_of_the_frozen_backbone() -> None:
    zoo = zoo_of("minilm:2", "minilm:6")
    assert zoo.modules == {"fc": (2, 384)}
    backbone = load(Model(device="cpu"), Adapter(), Path())
    inputs = zoo.read(TEXTS)
    assert [row.tolist() for row in inputs.fetch(range(4))] == backbone.tokenize(TEXTS)
    features, labels = learner(zoo, "b", TEXTS).features()
    assert labels is not None
    expected = torch.cat([backbone.encode(backbone.batch(inputs, [row]), {}) for row in range(4)])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert labels.tolist() == [0, 1, 0, 1]
    shallow, _ = learner(zoo, "a", TEXTS).features()
    assert (shallow - features).abs().max() > 0.01
    layers = {name.split(".")[4] for name in zoo.start("a", unknown) if ".encoder.layer." in name}
    assert layers == {"0", "1"}


def test_every_weight_of_an_own_model_can_be_trained_and_nothing_is_changed_in_place() -> None:
    zoo = zoo_of("cnn-5")
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    it = learner(zoo, "a", images, epochs=8, batch_size=5)
    start = {name: w for name, w in zoo.start("a", unknown).items() if name.startswith("own.")}
    before = {name: w.clone() for name, w in start.items()}
    fitted = Fit({}, train=but("A", "B")).alone(it)
    assert all(torch.equal(start[name], w) for name, w in before.items())
    assert all(not torch.equal(fitted.weights[name], w) for name, w in before.items())
    assert it.test(fitted.weights, "test")["loss"] < it.test({}, "test")["loss"]
    assert it.test({}, "test", 4)["rows"] == 4
    assert it.test({}, "validation") == {"rows": 0.0}
    assert it.input_norms(3)["fc"].shape == (500,)


def test_learners_of_their_own_models_run_one_by_one_in_a_cohort() -> None:
    zoo = zoo_of("cnn-4", "cnn-5")
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def turn() -> Any:
        fitted = yield from Fit({}, train=but("A"))
        return (yield from Score(fitted.weights, "test"))

    found = solve_together([(learner(zoo, client, images, batch_size=3), turn()) for client in "ab"])
    assert [metrics["rows"] for metrics in found] == [6.0, 6.0]
    assert found[0]["loss"] != found[1]["loss"]


def test_architectures_are_dealt_in_turn_and_drawn_by_name() -> None:
    zoo, again = zoo_of("cnn-1", "cnn-2"), zoo_of("cnn-1", "cnn-2")
    filters = {client: len(zoo.start(client, unknown)["own.conv2.weight"]) for client in "abc"}
    assert filters == {"a": 32, "b": 16, "c": 32}
    assert zoo.fingerprint() == again.fingerprint()
    assert zoo.fingerprint() != zoo_of("cnn-1", "cnn-2", seed=1).fingerprint()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (("cnn-6",), "expected cnn-1, cnn-2, cnn-3, cnn-4, cnn-5, or such as minilm:4"),
        (("minilm:7",), "with 7 layers, expected 1 to 6"),
        (("random-vit:1",), "only text encoders can be cut"),
        (("cnn-1", "minilm:2"), "minilm:2 .texts, 384 features. beside cnn-1 .images, 500 features."),
    ],
)
def test_what_cannot_be_is_said(own: tuple[str, ...], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        zoo_of(*own)


def test_rows_of_another_kind_are_refused() -> None:
    zoo = zoo_of("cnn-1")
    with pytest.raises(ModelError, match="reads images; found texts"):
        zoo.read(TEXTS)
    with pytest.raises(ModelError, match=r"shape \(3, 32, 32\); found \(1, 8, 8\)"):
        zoo.read(torch.zeros(2, 1, 8, 8))
