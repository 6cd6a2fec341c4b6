"""celora.models.activation_cache: what enters the first adapted layer is computed once, and no bit depends on it."""

import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.errors import ModelError
from celora.models import activation_cache as module
from celora.models.activation_cache import ActivationCache, LowerLayers
from celora.models.backbone import Backbone, load
from celora.models.learner import ModelLearner
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.tensors import but
from tests.classifier import forward, initial
from tests.classifier import rows as rows_of
from tests.toy import image

ROOM = 1 << 30


@cache
def minilm(layers: str = "last:2") -> Backbone:
    return load(Model(device="cpu"), Adapter(layers=layers), Path())


@cache
def vit(layers: str = "last:1", dropout: bool = False) -> Backbone:
    adapter = Adapter(targets=("q_proj", "v_proj"), layers=layers)
    return load(Model(backbone="random-vit", device="cpu", dropout=dropout), adapter, Path())


def rows(backbone: Backbone, first: int, count: int = 10) -> Rows:
    draw, labels = torch.Generator().manual_seed(first), torch.arange(count) % 2
    inputs: Any = torch.rand(count, 1, 8, 8, generator=draw)
    if backbone.kind == "text":
        sizes = torch.randint(3, 50, (count,), generator=draw).tolist()
        inputs = [torch.randint(1000, 9000, (size,), generator=draw).tolist() for size in sizes]
    return rows_of(inputs, labels, first)


def trained(backbone: Backbone, prefixes: ActivationCache | None, together: bool = False) -> Any:
    """Two rounds of three clients: their weights and scores."""
    passes, weights = forward(backbone, Lora(), prefixes), initial(backbone, Adapter(), Lora(), 2, seed=0)
    found: list[Any] = []
    for round in (1, 2):
        learners = [
            ModelLearner(
                passes, {"train": rows(backbone, 10 * k)}, weights, Recipe(batch_size=4, lr=2e-3),
                seed=0, client=str(k), round=round,
            )
            for k in range(3)
        ]  # fmt: skip
        problems = [(it, Fit({}, but())) for it in learners]
        fitted: Any = (
            Fit.together(problems, problems[0][0].shared)
            if together
            else [problem.alone(learner) for learner, problem in problems]
        )
        scores = passes.scores([(it, f.weights, "train", None) for it, f in zip(learners, fitted, strict=True)])
        found.append(([f.weights for f in fitted], scores, passes.features(learners)))
    return found


def test_the_topmost_layers_are_adapted_and_the_others_are_the_depth() -> None:
    assert (minilm().depth, len(minilm().targets)) == (4, 4)
    assert all(name.startswith(("encoder.layer.4.", "encoder.layer.5.")) for name in minilm().targets)
    assert (minilm("all").depth, len(minilm("all").targets)) == (0, 12)
    assert (vit().depth, vit("all").depth) == (1, 0)
    assert vit(dropout=True).depth == 0  # what dropout has touched cannot be kept


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter(layers="last:9"), r'adapter.layers = "last:9": minilm has 6 layers'),
        (
            Adapter(layers="last:2", targets=r"encoder\.layer\.0\.attention\.self\.query"),
            "none of the 1 modules .* lies in layers encoder.layer.4 and above",
        ),
    ],
)
def test_layers_that_are_not_there(adapter: Adapter, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(Model(device="cpu"), adapter, Path())


@pytest.mark.parametrize("layers", ["last", "first:2", "last:0", "2"])
def test_layers_are_all_or_the_last_few(layers: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        Adapter(layers=layers)


@pytest.mark.parametrize("backbone", [minilm, vit])
def test_a_row_has_the_same_prefix_in_whatever_company(backbone: Any) -> None:
    shared, own = backbone(), rows(backbone(), 0, 12)
    below = LowerLayers(shared)
    alone = [below.capture(shared.batch(own.examples.inputs, [row]))[0] for row in range(12)]
    for company in ([3, 1, 7], list(range(12)), [11, 0]):
        together = below.capture(shared.batch(own.examples.inputs, company))
        assert all(torch.equal(hidden, alone[row]) for row, hidden in zip(company, together, strict=True))


@pytest.mark.parametrize("backbone", [minilm, vit])
@pytest.mark.parametrize("together", [False, True])
def test_a_run_that_keeps_prefixes_is_bit_equal_to_one_that_does_not(backbone: Any, together: bool) -> None:
    expected = image(trained(backbone(), ActivationCache(backbone(), 0), together))
    for budget in (ROOM, 1):
        kept = ActivationCache(backbone(), budget)
        assert image(trained(backbone(), kept, together)) == expected
        assert kept.notices == []
        assert (kept._held > 0) == (budget == ROOM)  # beyond the budget they are in a file


@pytest.mark.parametrize("backbone", [minilm, vit])
def test_passing_over_layers_changes_nothing_but_rounding(backbone: Any) -> None:
    shared, own = backbone(), rows(backbone(), 0)
    batch = forward(shared, Lora(), ActivationCache(shared, ROOM)).batch(own, range(10))
    with ActivationCache(shared, ROOM).replayed(batch):
        replayed = shared.encode(batch, {})
    torch.testing.assert_close(replayed, shared.encode(batch, {}), atol=1e-5, rtol=0)


def test_lower_layers_see_a_row_once() -> None:
    backbone, computed, passed = minilm(), list[int](), list[int]()
    kept = ActivationCache(backbone, ROOM)
    inside, highest = backbone.layers[0].get_submodule("attention"), backbone.layers[-1]
    hooks = [inside.register_forward_hook(lambda module, args, answer: computed.append(len(args[0])))]
    hooks += [highest.register_forward_hook(lambda module, args, answer: passed.append(len(args[0])))]
    try:
        trained(backbone, kept)
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(passed) == 2 * 3 * 10 * 3  # two rounds of three clients' ten rows: trained on, scored, encoded
    assert sum(computed) == 30


def test_a_failed_pass_leaves_the_backbone_as_it_was() -> None:
    backbone, own = minilm(), rows(minilm(), 0)
    batch = backbone.batch(own.examples.inputs, range(4))
    before = backbone.encode(batch, {})
    with pytest.raises(RuntimeError), LowerLayers(backbone).replayed(torch.zeros(4, 3, 7)):
        backbone.encode(batch, {})
    assert torch.equal(backbone.encode(batch, {}), before)


def test_where_replaying_fails_every_layer_is_computed_and_a_notice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, own = minilm(), rows(minilm(), 0)
    batch = forward(backbone, Lora()).batch(own, range(10))
    before = backbone.encode(batch, {})
    monkeypatch.setattr(LowerLayers, "capture", lambda self, batch: [torch.zeros(0, 384)] * len(batch["input_ids"]))
    kept = ActivationCache(backbone, ROOM)
    with kept.replayed(batch):
        assert torch.equal(backbone.encode(batch, {}), before)
    assert kept.notices == [
        "activations below the first adapted layer of minilm are computed anew in every pass: "
        "features made of them differ from those that all layers make"
    ]


def test_a_full_disk_costs_time_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = image(trained(minilm(), ActivationCache(minilm(), 0)))
    monkeypatch.setattr(module.os, "posix_fallocate", full)
    kept = ActivationCache(minilm(), 1)
    assert image(trained(minilm(), kept)) == expected
    assert len(kept.notices) == 1
    assert "No space left on device" in kept.notices[0]
    assert "engine.cache_mb" in kept.notices[0]


def test_the_memory_budget_is_kept_and_the_rest_is_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled: list[int] = []
    mapped = module._mapped

    def counted(size: int) -> torch.Tensor:
        spilled.append(size)
        return mapped(size)

    monkeypatch.setattr(module, "_BLOCK", 1 << 17)
    monkeypatch.setattr(module, "_mapped", counted)
    kept = ActivationCache(minilm(), 1 << 18)
    trained(minilm(), kept)
    assert kept._held == 1 << 18
    assert sum(spilled) > 0
    assert len(kept._kept) == 30


def test_a_file_takes_its_space_where_posix_fallocate_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.os, "posix_fallocate")  # as on macOS
    block = module._mapped(1 << 12)
    assert block.shape == (1 << 12,)
    assert not block.any()
    block += 1
    assert int(block.sum()) == 1 << 12
