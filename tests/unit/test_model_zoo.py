"""celora.models.model_zoo: clients whose whole models are their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from celora.core.adapters import Lora
from celora.core.learner import Fit, Recipe, Score
from celora.core.solve import solve_together
from celora.core.training import fit
from celora.data.inputs import PixelArrays, Texts
from celora.errors import ModelError
from celora.models import Adapter, Model, ModelZoo, PrivateLearner, Rows, load
from celora.tensors import but

TEXTS = ["good", "a rather bad and long sentence", "fine by me", "no"]


def text_zoo() -> ModelZoo:
    return ModelZoo(Model(own=("minilm:2", "minilm:6"), device="cpu"), Path(), seed=0)


def learner(zoo: ModelZoo, at: int, inputs: Any, **recipe: Any) -> PrivateLearner:
    start = {**zoo.models[at].start, **zoo.initial(Adapter(rank=2), Lora(), 2, seed=0)}
    rows = Rows(inputs, torch.arange(len(inputs)) % 2)
    splits: Any = {"train": rows, "test": rows}
    settings: Any = {"family": Lora(), "scaling": 2.0, "seed": 0, "client": "a", "round": 1}
    return PrivateLearner(zoo.models[at], splits, start, Recipe(**recipe), **settings)


def test_an_encoder_with_all_its_layers_gives_the_features_of_the_frozen_backbone() -> None:
    zoo = text_zoo()
    assert (zoo.kind, zoo.width) == ("text", 384)
    backbone = load(Model(device="cpu"), Adapter(), Path())
    inputs = zoo.read(Texts(TEXTS), 1 << 20)
    assert [row.tolist() for row in inputs.fetch(range(4))] == backbone.tokenize(TEXTS)
    whole = learner(zoo, 1, inputs)
    features, labels = whole.features()
    expected = torch.cat([backbone.encode(backbone.batch(inputs, [row]), {}) for row in range(4)])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert labels.tolist() == [0, 1, 0, 1]
    shallow, _ = learner(zoo, 0, inputs).features()
    assert (shallow - features).abs().max() > 0.01
    layers = {name.split(".")[4] for name in zoo.models[0].start if ".encoder.layer." in name}
    assert layers == {"0", "1"}


def test_every_weight_of_an_own_model_can_be_trained_and_nothing_is_changed_in_place() -> None:
    zoo = ModelZoo(Model(own=("cnn-5",), device="cpu"), Path(), seed=0)
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    it = learner(zoo, 0, images, epochs=8, batch_size=5)
    before = {name: w.clone() for name, w in zoo.models[0].start.items()}
    fitted = fit(it, Fit({}, train=but("A", "B")))
    assert all(torch.equal(zoo.models[0].start[name], w) for name, w in before.items())
    assert all(not torch.equal(fitted.weights[name], w) for name, w in before.items())
    assert it.test(fitted.weights, "test")["loss"] < it.test({}, "test")["loss"]
    assert it.test({}, "test", 4)["rows"] == 4
    assert it.test({}, "validation") == {"rows": 0.0}
    assert it.input_norms(3)["fc"].shape == (500,)


def test_learners_of_their_own_models_run_one_by_one_in_a_cohort() -> None:
    zoo = ModelZoo(Model(own=("cnn-4", "cnn-5"), device="cpu"), Path(), seed=0)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def turn() -> Any:
        fitted = yield Fit({}, train=but("A"))
        return (yield Score(fitted.weights, "test"))

    found = solve_together([(learner(zoo, at, images, batch_size=3), turn()) for at in (0, 1)])
    assert [metrics["rows"] for metrics in found] == [6.0, 6.0]
    assert found[0]["loss"] != found[1]["loss"]


def test_architectures_are_dealt_in_turn_and_drawn_by_name() -> None:
    zoo, again = (ModelZoo(Model(own=("cnn-1", "cnn-2"), device="cpu"), Path(), seed=0) for _ in range(2))
    assert [zoo.of(client, "abc").name for client in "abc"] == ["cnn-1", "cnn-2", "cnn-1"]
    assert zoo.fingerprint() == again.fingerprint()
    assert zoo.fingerprint() != ModelZoo(Model(own=("cnn-1", "cnn-2"), device="cpu"), Path(), seed=1).fingerprint()


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
        ModelZoo(Model(own=own, device="cpu"), Path(), seed=0)


def test_rows_of_another_kind_are_refused() -> None:
    zoo = ModelZoo(Model(own=("cnn-1",), device="cpu"), Path(), seed=0)
    with pytest.raises(ModelError, match="reads images; found texts"):
        zoo.read(Texts(TEXTS), 0)
    with pytest.raises(ModelError, match=r"shape \(3, 32, 32\); found \(1, 8, 8\)"):
        zoo.read(PixelArrays(torch.zeros(2, 1, 8, 8)), 0)
