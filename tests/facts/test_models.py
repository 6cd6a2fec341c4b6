"""Claims of the models package: any client's adapter is plain PEFT LoRA, and the Slots are plain PEFT."""

import runpy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

from celora.core.adapters import Family, Lora, Tri
from celora.core.learner import Recipe
from celora.models.backbone import Backbone, load
from celora.models.export import export_shared, load_export
from celora.models.learner import ModelLearner
from celora.models.loading import embedded, quiet
from celora.models.settings import Adapter, Model
from celora.tasks.classify import Classify
from celora.tensors import part
from tests.classifier import forward, initial, predict
from tests.classifier import rows as rows_of
from tests.unit.test_models_architectures import ARCHITECTURES, saved

TEXTS = ["a text", "and another one"]  # as in the README of an export
CARD = Classify(classes=tuple("abcde")).model_card()


@contextmanager
def stock() -> Iterator[None]:
    """Peft 0.21 calls a function that transformers 5.23 deprecates."""
    with warnings.catch_warnings(), quiet():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def random_weights(backbone: Backbone, adapter: Adapter, family: Family) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    weights = initial(backbone, adapter, family, 5, seed=0)
    return {name: w + 0.1 * torch.randn(w.shape, generator=g) for name, w in weights.items()}


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The snippet of an export, word for word, as a program of its own in another folder."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 16
    (folder.parent / "snippet.py").write_text(code)
    monkeypatch.chdir(folder.parent)
    with stock():
        return runpy.run_path("snippet.py")


@pytest.mark.parametrize("family", [Lora(), Tri()], ids=["lora", "tri"])
@pytest.mark.parametrize("targets", [("query", "value"), "all-linear"])
def test_stock_peft_gives_the_same_logits_from_a_text_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family, targets: Any
) -> None:
    model, adapter = Model(device="cpu"), Adapter(targets=targets)
    backbone = load(model, adapter, tmp_path)
    weights = random_weights(backbone, adapter, family)
    export_shared(tmp_path / "out", backbone, weights, family=family, card=CARD, model=model, adapter=adapter)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    ours = predict(backbone, family, weights, backbone.tokenize(TEXTS))
    frozen = predict(
        backbone, family, {n: w for n, w in weights.items() if part(n) == "head"}, backbone.tokenize(TEXTS)
    )
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - frozen).abs().max() > 1e-2  # or the adapter would prove nothing


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_stock_peft_gives_the_same_logits_from_an_image_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: Any
) -> None:
    model, adapter = Model(backbone="random-vit", device="cpu", pooling=pooling), Adapter(targets="all-linear")
    backbone = load(model, adapter, tmp_path)
    weights = random_weights(backbone, adapter, Tri())
    export_shared(tmp_path / "out", backbone, weights, family=Tri(), card=CARD, model=model, adapter=adapter)
    theirs = run_readme(tmp_path / "out", monkeypatch)
    assert (predict(backbone, Tri(), weights, theirs["images"]) - theirs["logits"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["convnext", "mobilenet-v1", "mobilenet-v2", "efficientnet"])
def test_stock_peft_gives_the_same_logits_from_adapted_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    saved(ARCHITECTURES[name].config, tmp_path / "base")
    model, adapter = Model(backbone="base", device="cpu"), Adapter(targets="all-linear", rank=2)
    backbone = load(model, adapter, tmp_path)
    weights = random_weights(backbone, adapter, Tri())
    export_shared(tmp_path / "out", backbone, weights, family=Tri(), card=CARD, model=model, adapter=adapter)
    theirs = run_readme(tmp_path / "out", monkeypatch)
    ours = predict(backbone, Tri(), weights, theirs["images"])
    frozen = predict(backbone, Tri(), {n: w for n, w in weights.items() if part(n) == "head"}, theirs["images"])
    assert bool(backbone.convolutions) == (name != "convnext")
    assert (ours - theirs["logits"]).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)
    assert (ours - frozen).abs().max() > 1e-2  # or the adapter would prove nothing
    again, plain = load_export(tmp_path / "out")
    assert plain
    assert all(again[f"{module}.A"].shape == (2, d_in) for module, (_, d_in) in backbone.targets.items())


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_decoder_that_stores_its_weights_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: Any
) -> None:
    with quiet():
        GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path / "gpt")
    tokens = AutoTokenizer.from_pretrained(embedded(), model_input_names=["input_ids", "attention_mask"])
    tokens.save_pretrained(tmp_path / "gpt")
    model = Model(backbone="gpt", device="cpu", pooling=pooling, max_length=32)
    adapter = Adapter(targets=("c_attn",), rank=2)
    backbone = load(model, adapter, tmp_path)
    assert backbone.targets["h.0.attn.c_attn"] == (48, 16)
    weights = random_weights(backbone, adapter, Tri())
    export_shared(tmp_path / "out", backbone, weights, family=Tri(), card=CARD, model=model, adapter=adapter)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    ours = predict(backbone, Tri(), weights, backbone.tokenize(TEXTS))
    assert (ours - theirs).abs().max() <= 1e-5


def test_slots_give_the_loss_and_gradients_of_plain_peft() -> None:
    adapter = Adapter(rank=4)
    backbone = load(Model(device="cpu"), adapter, Path())
    weights = random_weights(backbone, adapter, Lora())
    weights = {name: w.requires_grad_() for name, w in weights.items()}
    rows = rows_of(backbone.tokenize(["one", "a longer text than that", "two"]), torch.tensor([0, 4, 2]))
    shared = forward(backbone, Lora(), classes=5)
    it = ModelLearner(shared, {"train": rows}, weights, Recipe(), seed=0, client="a", round=1)
    batch = next(it.batches())
    loss = it.losses(weights, batch)
    names = [name for name in weights if part(name) in "AB"]
    ours = dict(zip(names, torch.autograd.grad(loss, [weights[name] for name in names]), strict=True))

    with stock():
        base = AutoModel.from_pretrained(embedded())
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        plain = get_peft_model(base, config).eval()
    parameters = {
        name.removeprefix("base_model.model.").replace(f".lora_{letter}.default.weight", f".{letter}"): parameter
        for letter in "AB"
        for name, parameter in plain.named_parameters()
        if f"lora_{letter}" in name
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    hidden = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    theirs = cross_entropy(pooled @ weights["head.weight"].T + weights["head.bias"], batch["labels"])
    torch.testing.assert_close(loss, theirs, atol=1e-6, rtol=1e-6)
    for name, gradient in zip(parameters, torch.autograd.grad(theirs, list(parameters.values())), strict=True):
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)
