"""celora.models.learner: batches, one client against K, scores, draws."""

import json
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.core.adapters import Family, Lora, Tri
from celora.core.learner import Learner, Recipe
from celora.core.problems import Fit
from celora.errors import ModelError
from celora.models.backbone import Backbone, load
from celora.models.learner import ModelLearner
from celora.models.rows import Rows, bucketed, budgeted
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone
from celora.tensors import Tensors, but
from tests.classifier import forward, initial, predict
from tests.classifier import rows as rows_of

ADAPTER = Adapter(targets=("q_proj", "v_proj"), rank=3)
TEXTS = [
    "good", "bad", "a very good film", "such a bad and boring film that nobody should ever see it",
    "good fun", "bad news",
]  # fmt: skip


@cache
def vit(dropout: bool = False) -> Backbone:
    return load(Model(backbone="random-vit", device="cpu", dropout=dropout), ADAPTER, Path())


@cache
def minilm() -> Backbone:
    return load(Model(device="cpu"), Adapter(), Path())


def images(count: int) -> Rows:
    """Bright images are class 1."""
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    return rows_of(noise * (0.5 + labels.view(-1, 1, 1, 1)), labels)


def texts() -> Rows:
    return rows_of(minilm().tokenize(TEXTS), torch.tensor([1, 0, 1, 0, 1, 0]))


def start(backbone: Backbone, family: Family = Tri()) -> dict[str, Tensor]:
    adapter = ADAPTER if backbone.kind == "image" else Adapter()
    return initial(backbone, adapter, family, 2, seed=0)


def shaken(weights: Tensors, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: w + 0.05 * torch.randn(w.shape, generator=g) for name, w in weights.items()}


def learner(
    backbone: Backbone, rows: Rows, client: str = "a", round: int = 1, family: Family = Tri(), **recipe: Any
) -> ModelLearner:
    """A client with these rows in every split."""
    splits: dict[Any, Rows] = {"train": rows, "test": rows}
    weights, shared = start(backbone, family), forward(backbone, family)
    return ModelLearner(shared, splits, weights, Recipe(**recipe), seed=0, client=client, round=round)


def pixels(batches: list[Any]) -> list[str]:
    return [json.dumps(batch["pixel_values"].flatten(1).sum(1).tolist()) for batch in batches]


def test_a_learner_is_what_core_expects() -> None:
    it: Learner = learner(vit(), images(6))
    assert (it.examples, it.device.type) == (6, "cpu")


def test_a_pass_covers_every_row_once_in_batches_of_like_length() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 100, (203,), generator=g).tolist()
    batches = list(bucketed(203, lambda rows: [sizes[row] for row in rows], 8, g))
    assert Counter(row for batch in batches for row in batch) == Counter(range(203))
    assert sorted(map(len, batches)) == [3] + [8] * 25
    padded = sum(max(sizes[row] for row in batch) * len(batch) for batch in batches)
    assert padded < 1.2 * sum(sizes)


def test_inference_batches_stay_within_the_token_budget() -> None:
    sizes = [900, 3, 700, 400, 2000, 5]
    batches = list(budgeted(sizes, 1024))
    assert Counter(row for batch in batches for row in batch) == Counter(range(6))
    assert batches == [[1, 5], [3], [2], [0], [4]]  # a row longer than the budget goes alone
    assert list(budgeted([], 1024)) == []


@pytest.mark.parametrize(("recipe", "sizes"), [({"epochs": 2}, [4, 4, 2] * 2), ({"steps": 4}, [4, 4, 4, 2])])
def test_epochs_or_steps(recipe: dict[str, int], sizes: list[int]) -> None:
    batches = list(learner(vit(), images(10), batch_size=4, **recipe).batches())
    assert sorted(len(batch["labels"]) for batch in batches) == sorted(sizes) or "steps" in recipe
    assert len(batches) == len(sizes)
    if "epochs" in recipe:
        assert sum(len(batch["labels"]) for batch in batches) == 20


def test_mini_batches_of_another_size() -> None:
    batches = list(learner(vit(), images(10), batch_size=4).batches(1))
    assert [len(batch["labels"]) for batch in batches] == [1] * 10


def test_batches_have_an_address() -> None:
    rows = images(12)
    same = learner(vit(), rows, batch_size=4)
    first, second = pixels(list(same.batches())), pixels(list(same.batches()))
    assert first != second  # a second Fit in a turn goes on drawing
    again = learner(vit(), rows, batch_size=4)
    assert (pixels(list(again.batches())), pixels(list(again.batches()))) == (first, second)
    for other in (learner(vit(), rows, client="b", batch_size=4), learner(vit(), rows, round=2, batch_size=4)):
        assert pixels(list(other.batches())) != first


def test_a_client_without_training_rows_has_no_batches() -> None:
    splits: dict[Any, Rows] = {"train": images(6).first(0)}
    empty = ModelLearner(forward(vit(), Tri()), splits, start(vit()), Recipe(steps=3), seed=0, client="a", round=1)
    assert (empty.examples, list(empty.batches()), empty.test({}, "test")) == (0, [], {"rows": 0.0})
    features, labels = empty.features()
    assert labels is not None
    assert (features.shape, labels.shape) == ((0, 64), (0,))


@pytest.mark.parametrize("backbone", [vit, minilm])
@pytest.mark.parametrize("family", [Lora(), Tri()], ids=["lora", "tri"])
def test_clients_side_by_side_have_their_own_losses_and_gradients(backbone: Any, family: Family) -> None:
    shared, rows = backbone(), texts() if backbone is minilm else images(6)
    many = [shaken(start(shared, family), seed) for seed in range(3)]
    learners = [learner(shared, rows, client=str(k), family=family, batch_size=2, steps=1) for k in range(3)]
    batches = [next(it.batches()) for it in learners]

    stacked = {name: torch.stack([w[name] for w in many]).requires_grad_() for name in many[0]}
    losses = learners[0].losses(stacked, forward(shared, family).join(batches))
    gradients = dict(zip(stacked, torch.autograd.grad(losses.sum(), list(stacked.values())), strict=True))

    assert losses.shape == (3,)
    for k in range(3):
        alone = {name: w.clone().requires_grad_() for name, w in many[k].items()}
        loss = learners[k].losses(alone, batches[k])
        torch.testing.assert_close(losses[k], loss, atol=1e-6, rtol=1e-6)
        for name, gradient in zip(alone, torch.autograd.grad(loss, list(alone.values())), strict=True):
            torch.testing.assert_close(gradients[name][k], gradient, atol=1e-6, rtol=1e-5)


def test_a_smaller_batch_beside_larger_ones_keeps_its_mean() -> None:
    many = [shaken(start(minilm()), seed) for seed in range(2)]
    stacked = {name: torch.stack([w[name] for w in many]) for name in many[0]}
    it, shared = learner(minilm(), texts()), forward(minilm(), Tri())
    batches = [shared.batch(texts(), chosen) for chosen in ([0, 3, 4], [1])]
    together = it.losses(stacked, shared.join(batches))
    alone = torch.stack([it.losses(w, batch) for w, batch in zip(many, batches, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_only_some_weights_need_the_client_axis() -> None:
    weights = shaken(start(vit()), 0)
    cores = {name: torch.stack([w, 2 * w]) for name, w in weights.items() if name.endswith(".C")}
    it = learner(vit(), images(6), batch_size=6)
    batch = next(it.batches())
    together = it.losses({**weights, **cores}, forward(vit(), Tri()).join([batch, batch]))
    alone = [it.losses({**weights, **{name: w[k] for name, w in cores.items()}}, batch) for k in range(2)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("backbone", [vit, minilm])
def test_training_is_bit_equal_and_lowers_the_loss(backbone: Any) -> None:
    shared, rows = backbone(), texts() if backbone is minilm else images(16)
    torch.manual_seed(1)
    one = Fit({}, but()).alone(learner(shared, rows, steps=8, lr=2e-2))
    torch.manual_seed(2)
    two = Fit({}, but()).alone(learner(shared, rows, steps=8, lr=2e-2))
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    it = learner(shared, rows)
    before, after = it.test({}, "test"), it.test(one.weights, "test")
    assert after["loss"] < before["loss"]
    assert after["score"] == 1.0


def test_dropout_is_on_in_training_only_and_has_an_address() -> None:
    rows = images(6)
    one, two, plain = (learner(backbone, rows) for backbone in (vit(dropout=True), vit(dropout=True), vit()))
    batch = next(plain.batches())
    first, second = one.losses(one.initial, batch), one.losses(one.initial, batch)
    assert first != second
    assert [two.losses(two.initial, batch) for _ in range(2)] == [first, second]
    assert plain.losses(plain.initial, batch) == plain.losses(plain.initial, batch)
    assert one.test({}, "test") == plain.test({}, "test")


def test_predictions_come_in_the_order_of_the_rows() -> None:
    weights = shaken(start(minilm()), 0)
    ids = minilm().tokenize([text * repeat for repeat in (40, 1, 20) for text in TEXTS])
    together = predict(minilm(), Tri(), weights, ids)
    alone = torch.cat([predict(minilm(), Tri(), weights, [row]) for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_features_are_the_frozen_backbones() -> None:
    it = learner(vit(), images(6))
    Fit({}, but()).alone(it)
    features, labels = it.features()
    frozen = vit().encode(vit().batch(images(6).examples.inputs, range(6)), {})
    torch.testing.assert_close(features, frozen)
    assert labels is not None
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert not features.requires_grad
    assert not features.is_inference()  # an algorithm may differentiate through what it does with them


def test_nothing_handed_in_is_changed() -> None:
    weights, rows = shaken(start(vit()), 0), images(6)
    before = {name: w.clone() for name, w in weights.items()}
    it = learner(vit(), rows)
    Fit(weights, but()).alone(it)
    it.test(weights, "test")
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_rows_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ModelError, match="reads texts; found images"):
        AdaptedBackbone(minilm(), Tri()).read(torch.zeros(2, 1, 8, 8))


def test_batches_of_another_size_are_one_pass_over_the_rows_whatever_the_recipe() -> None:
    for recipe in ({"steps": 2}, {"epochs": 3}):
        sizes = [len(batch["labels"]) for batch in learner(vit(), images(10), batch_size=4, **recipe).batches(3)]
        assert sorted(sizes) == [1, 3, 3, 3]


def test_of_all_mini_batches_of_a_client_one_is_in_memory() -> None:
    it = learner(minilm(), texts(), batch_size=2, epochs=3)
    batches = list(it.batches())
    first = batches[0]["input_ids"]
    alive = [weakref.ref(batch["input_ids"]) for batch in batches]
    assert [one() is not None for one in alive] == [True] + [False] * 7 + [True]
    assert torch.equal(batches[0]["input_ids"], first)
    assert batches[0]["input_ids"] is batches[0]["input_ids"]
