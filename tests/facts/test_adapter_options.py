"""Claims of `[adapter]`: its options are stock PEFT's, and what is exported needs neither celora nor a changed base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Config, GPT2Model

from celora.core.adapters import Dual, Family, Lora, Residual, Tri, modules
from celora.errors import ModelError
from celora.models.backbone import Backbone, load
from celora.models.export import load_export
from celora.models.loader import ModelLoader
from celora.models.loading import embedded
from celora.models.pissa import principal
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tensors import Tensors, only, select
from tests.classifier import initial, task
from tests.facts.test_models import TEXTS, run_readme, stock

PATTERNS = {r"layer\.[0-2]\.attention\.self\.query": 2, "5.attention.self.value": 12}
ALPHAS = {"value": 3.0, "layer.1.attention.self.query": 40.0}


def moved(weights: Tensors, by: float = 0.05) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: w + by * torch.randn(w.shape, generator=g) for name, w in weights.items()}


def models(adapter: Adapter, family: Family, model: Model | None = None, base: Path | None = None) -> SharedBackbone:
    found = ModelLoader()(
        model or Model(device="cpu"), task(5), adapter=adapter, family=family, seed=0, base=base or Path()
    )
    assert isinstance(found, SharedBackbone)
    return found


def peft_layers(config: LoraConfig, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """MiniLM under stock PEFT, and its LoRA layers by name."""
    with stock():
        base = AutoModel.from_pretrained(embedded(), config=AutoConfig.from_pretrained(embedded(), **changes))
        plain = get_peft_model(base, config)
    layers = {name: module for name, module in plain.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return plain.eval(), layers


def inputs_of(backbone: Backbone, texts: list[str]) -> dict[str, Tensor]:
    rows = backbone.tokenize(texts)
    return backbone.batch(rows, range(len(rows)))


def pooled(plain: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Means over tokens."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    features: Tensor = (plain(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return features


@pytest.mark.parametrize("rslora", [False, True], ids=["standard", "rslora"])
def test_every_module_has_the_rank_and_the_factor_that_peft_gives_it(rslora: bool) -> None:
    adapter = Adapter(
        rank=8, alpha=16, scaling="rslora" if rslora else "standard", rank_pattern=PATTERNS, alpha_pattern=ALPHAS
    )
    config = LoraConfig(
        r=8, lora_alpha=16, use_rslora=rslora, rank_pattern=PATTERNS, alpha_pattern=ALPHAS,
        target_modules=["query", "value"],
    )  # fmt: skip
    _, theirs = peft_layers(config)
    assert {name: adapter.rank_at(name) for name in theirs} == {n: layer.r["default"] for n, layer in theirs.items()}
    scalings = {name: layer.scaling["default"] for name, layer in theirs.items()}
    assert len(set(scalings.values())) > 2
    assert load(Model(device="cpu"), adapter, Path()).scalings == scalings
    assert {name: adapter.factor_at(name) for name in theirs} == scalings


@pytest.mark.parametrize("family", [Lora(), Tri(), Dual(2), Residual()], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "options",
    [
        {"scaling": "rslora", "alpha": 6.0},
        {"rank_pattern": PATTERNS, "alpha_pattern": ALPHAS},
        {"scaling": "rslora", "alpha": 6.0, "rank_pattern": PATTERNS, "alpha_pattern": ALPHAS},
        {"init": "pissa"},
        {"init": "pissa", "scaling": "rslora", "alpha": 6.0, "rank_pattern": PATTERNS},
    ],
    ids=["rslora", "patterns", "both", "pissa", "all"],
)
def test_stock_peft_gives_the_same_logits_from_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family, options: Any
) -> None:
    adapter = Adapter(rank=4, dropout=0.5, **options)
    here = models(adapter, family)
    weights = moved(here.initial)
    here.export(tmp_path / "out", "a", weights)
    ours = here.predict("a", weights, TEXTS)
    frozen = here.predict("a", select(weights, only("head")), TEXTS)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - frozen).abs().max() > 1e-2
    read, plain = load_export(tmp_path / "out")
    assert plain
    again = models(adapter.exported, Lora()).predict("a", read, TEXTS)
    assert (ours - again).abs().max() <= 1e-5


def test_one_factor_holds_for_all_modules_of_an_export(tmp_path: Path) -> None:
    """vLLM reads lora_alpha, r and use_rslora, and no patterns."""
    adapter = Adapter(rank=4, rank_pattern=PATTERNS, alpha_pattern=ALPHAS)
    here = models(adapter, Lora())
    here.export(tmp_path / "out", "a", here.initial)
    config: Any = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.lora_alpha) == (12, 24)
    ranks = {name: config.rank_pattern.get(name, config.r) for name in config.target_modules}
    assert set(ranks.values()) == {2, 4, 12}
    assert {config.alpha_pattern.get(name, config.lora_alpha) / r for name, r in ranks.items()} == {adapter.factor}


def test_dropout_masks_are_drawn_and_scaled_as_pefts() -> None:
    adapter = Adapter(rank=4, dropout=0.3)
    backbone = load(Model(device="cpu"), adapter, Path())
    weights = moved(initial(backbone, adapter, Lora(), 5, seed=0))
    inputs = inputs_of(backbone, ["one", "a longer text than that", "two"])
    network = AdaptedBackbone(backbone, Lora(), rate=adapter.dropout)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["query", "value"])
    plain, layers = peft_layers(config, **none)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(weights[f"{name}.A"])
            layer.lora_B["default"].weight.copy_(weights[f"{name}.B"])
        evaluated = pooled(plain, inputs)
        plain.train()
        torch.manual_seed(7)
        trained = pooled(plain, inputs)
        state = torch.random.get_rng_state()
        torch.testing.assert_close(network.features(weights, inputs, 7), trained, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(network.features(weights, inputs), evaluated, atol=1e-6, rtol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (trained - evaluated).abs().max() > 1e-3


@pytest.mark.parametrize("rslora", [False, True], ids=["standard", "rslora"])
def test_pissa_starts_where_peft_does_and_trains_over_the_same_residual(rslora: bool) -> None:
    alpha = 6.0 if rslora else 8.0
    adapter = Adapter(rank=4, alpha=alpha, scaling="rslora" if rslora else "standard", init="pissa")
    here = models(adapter, Lora())
    config = LoraConfig(
        r=4, lora_alpha=int(alpha), use_rslora=rslora, init_lora_weights="pissa", target_modules=["query", "value"]
    )
    plain, layers = peft_layers(config)
    weights = moved(here.initial, 0.02)
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(here.initial[f"{name}.B"] @ here.initial[f"{name}.A"], b @ a, atol=1e-4, rtol=0)
            a.copy_(weights[f"{name}.A"])
            b.copy_(weights[f"{name}.B"])
        backbone = load(Model(device="cpu"), adapter, Path())
        theirs = pooled(plain, inputs_of(backbone, TEXTS)) @ weights["head.weight"].T + weights["head.bias"]
    ours = here.predict("a", weights, TEXTS)
    assert (ours - theirs).abs().max() <= 1e-4  # the residual is another sum of the same numbers
    assert (ours - here.predict("a", here.initial, TEXTS)).abs().max() > 1e-2


@pytest.mark.parametrize("family", [Lora(), Tri(), Dual(2), Residual()], ids=lambda family: family.name)
def test_pissa_starts_from_the_frozen_backbone(family: Family) -> None:
    here = models(Adapter(rank=4, init="pissa"), family)
    start = here.predict("a", here.initial, TEXTS)
    assert (start - here.predict("a", select(here.initial, only("head")), TEXTS)).abs().max() <= 1e-5
    for w in modules(here.initial).values():
        a, b = family.lora(w) or pytest.fail("no matrix")
        assert (b @ a).norm() > 1


def test_pissa_takes_the_largest_singular_values_with_a_sign_of_its_own() -> None:
    adapter = Adapter(rank=3, alpha=12, init="pissa")
    backbone = load(Model(device="cpu"), adapter, Path())
    name = "encoder.layer.2.attention.self.value"
    a, b = principal(backbone, adapter)[name]
    values = torch.linalg.svdvals(backbone.weight(name))
    left = backbone.weight(name) - 4 * b.double() @ a.double()
    torch.testing.assert_close(torch.linalg.svdvals(left)[:5], values[3:8], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


def test_pissa_reads_weights_that_are_stored_transposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stock():
        GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path / "gpt")
        tokens = AutoTokenizer.from_pretrained(embedded(), model_input_names=["input_ids", "attention_mask"])
        tokens.save_pretrained(tmp_path / "gpt")
    here = models(
        Adapter(rank=2, init="pissa"), Lora(), Model(backbone="gpt", device="cpu", max_length=32), base=tmp_path
    )
    assert here.initial["h.0.attn.c_attn.B"].shape == (48, 2)  # PEFT's own default for GPT-2
    weights = moved(here.initial)
    here.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    assert (here.predict("a", weights, TEXTS) - theirs).abs().max() <= 1e-5


def test_an_adapter_of_more_ranks_than_singular_values_is_refused() -> None:
    with pytest.raises(ModelError, match=r"has 384 singular values; found rank 385"):
        models(Adapter(rank=385, init="pissa"), Lora())


@pytest.mark.parametrize("targets", [("intermediate.dense",), ("layer.0.output.dense",)], ids=["high", "wide"])
def test_pissa_is_the_best_approximation_of_matrices_that_are_not_square(targets: tuple[str, ...]) -> None:
    adapter = Adapter(rank=5, alpha=15, targets=targets, init="pissa")
    backbone = load(Model(device="cpu"), adapter, Path())
    name, (a, b) = next(iter(principal(backbone, adapter).items()))
    u, values, vh = torch.linalg.svd(backbone.weight(name), full_matrices=False)
    assert u.shape[0] != vh.shape[1]
    torch.testing.assert_close(3 * b.double() @ a.double(), u[:, :5] * values[:5] @ vh[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
