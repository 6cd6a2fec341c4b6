"""What an export promises: stock PEFT finds every tensor's module, the function is the same, and nothing is a no-op."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from celora.core.adapters import Gated, Lora, Tri
from celora.errors import ModelError
from celora.models import export, plain_lora
from celora.models.backbone import load
from celora.models.export import load_export
from celora.models.plain_lora import SERVED
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import SharedBackbone
from celora.tasks.causal_lm import CausalLm
from celora.tasks.classify import Classify
from celora.tasks.tag import Tag
from tests import language
from tests.facts.test_models import TEXTS, run_readme
from tests.unit.test_models_architectures import ARCHITECTURES, IMAGES, saved

THREE = Classify(classes=("a", "b", "c"))


def shared(folder: Path, name: str, task: Any = THREE, family: Any = None, **adapter: Any) -> SharedBackbone:
    of = ARCHITECTURES[name]
    if not (folder / name).exists():
        saved(of.config, folder / name)
    given: dict[str, Any] = {"targets": of.pattern or (of.suffix,), "rank": 3, **adapter}
    model, settings = Model(backbone=name, device="cpu", max_length=32), Adapter(**given)
    backbone = load(model, settings, folder)
    return SharedBackbone(backbone, task, model=model, adapter=settings, family=family or Lora(), seed=0)


def moved(of: SharedBackbone, by: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: w + by * torch.randn(w.shape, generator=draw) for name, w in of.initial.items()}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()


# --- ranks that vLLM serves


@pytest.mark.parametrize("settings", [
    {},
    {"alpha": 5.0, "scaling": "rslora"},
    {"rank_pattern": {"layers.1.*q_proj": 9}, "alpha_pattern": {"v_proj": 2.0}},
    {"init": "pissa"},
], ids=["standard", "rslora", "patterns", "pissa"])  # fmt: skip
def test_ranks_are_filled_up_to_one_that_vllm_serves_and_the_function_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    of = shared(tmp_path, "llama", targets=("q_proj", "v_proj"), **settings)
    weights = moved(of)
    done = of.export(tmp_path / "out", "a", weights, pad=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = 16 if "rank_pattern" in settings else 8
    assert (done.rank, config["r"], config["rank_pattern"], config["alpha_pattern"]) == (expected, expected, {}, {})
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {w.shape[0] for name, w in state.items() if "lora_A" in name} == {expected}
    ours = of.predict("a", weights, TEXTS)
    assert apart(ours, run_readme(tmp_path / "out", monkeypatch)["logits"]) <= (1e-4 if "init" in settings else 1e-5)
    again, plain = load_export(tmp_path / "out")
    adapter = of._adapter.exported
    read = SharedBackbone(of._backbone, THREE, model=of._model, adapter=adapter, family=Lora(), seed=0)
    if "alpha_pattern" not in settings:  # a backbone holds the alphas that it was loaded with
        assert plain and apart(ours, read.predict("a", again, TEXTS)) <= (1e-4 if "init" in settings else 1e-5)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (2, 8), (8, 8), (65, 128), (300, 320), (513, 513)])
def test_a_served_rank_is_the_next_that_vllm_knows(rank: int, expected: int) -> None:
    assert plain_lora.served(rank) == expected
    assert expected in SERVED or expected > 512


def test_a_run_writes_its_adapters_at_their_own_rank(tmp_path: Path) -> None:
    of = shared(tmp_path, "llama")
    assert of.export(tmp_path / "out", "a", moved(of)).rank == 3


# --- whole models


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "opt", "llama", "gemma", "gemma3", "falcon"])
def test_a_merged_model_of_texts_gives_the_logits_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    of = shared(tmp_path, name, family=Tri())
    weights = moved(of)
    ours, before = of.predict("a", weights, TEXTS), of._backbone.fingerprint()
    done = of.export(tmp_path / "out", "a", weights, format="merged")
    theirs = run_readme(tmp_path / "out", monkeypatch)
    assert apart(ours, theirs["logits"]) <= 1e-5
    assert "peft" not in (tmp_path / "out" / "README.md").read_text()
    assert (done.kind, done.base, done.rank) == ("merged", None, None)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    if type(theirs["model"]).__name__.endswith("SequenceClassification"):
        assert theirs["model"].config.id2label == {0: "a", 1: "b", 2: "c"}
    assert type(theirs["model"]).__name__.endswith("SequenceClassification") == (name not in ("bert", "albert"))
    del of._backbone.__dict__["_digest"]
    assert of._backbone.fingerprint() == before  # the frozen weights are as they were


@pytest.mark.parametrize("name", ["vit", "swin", "mobilenet-v1", "mobilenet-v2", "efficientnet"])
def test_a_merged_model_of_images_gives_the_logits_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    of = shared(tmp_path, name, targets="all-linear")
    weights = moved(of, 0.1)
    of.export(tmp_path / "out", "a", weights, format="merged")
    theirs = run_readme(tmp_path / "out", monkeypatch)
    rounding = 10 if of._backbone.convolutions else 1  # they are many, one after another
    assert apart(of.predict("a", weights, theirs["images"]), theirs["logits"]) <= rounding * 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gemma2"])
def test_a_merged_language_model_answers_as_the_adapter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    language.saved(tmp_path / family, family)
    model, adapter = Model(backbone=family, device="cpu"), Adapter(targets=(language.FAMILIES[family][1],), rank=3)
    backbone = load(model, adapter, tmp_path, "causal-lm")
    of = SharedBackbone(backbone, CausalLm(answer_tokens=9), model=model, adapter=adapter, family=Lora(), seed=0)
    weights = moved(of, 2.0)
    done = of.export(tmp_path / "out", "a", weights, format="merged")
    assert done.generates
    theirs = run_readme(tmp_path / "out", monkeypatch)
    assert [text.strip() for text in theirs["answers"]] == of.answers("a", weights, theirs["prompts"])
    assert theirs["model"].config.use_cache is True
    assert of.answers("a", of.initial, theirs["prompts"]) != of.answers("a", weights, theirs["prompts"])


def test_a_merged_model_of_tags_holds_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = shared(tmp_path, "roberta", Tag(classes=("O", "X")))
    weights = moved(of)
    of.export(tmp_path / "out", "a", weights, format="merged")
    theirs = run_readme(tmp_path / "out", monkeypatch)
    ours = of.predict("a", weights, theirs["texts"])
    ids = theirs["inputs"].word_ids(0)
    assert apart(ours[0], theirs["logits"][0, [ids.index(word) for word in range(2)]]) <= 1e-5
    assert not (tmp_path / "out" / "head.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in IMAGES if "net" not in name])
def test_stock_peft_runs_an_adapter_of_every_family_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    of = shared(tmp_path, name)
    weights = moved(of)
    of.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)
    assert apart(of.predict("a", weights, theirs["images"]), theirs["logits"]) <= 1e-5


# --- what is not handed out


def test_an_adapter_that_is_no_matrix_is_not_merged(tmp_path: Path) -> None:
    of = shared(tmp_path, "bert", family=Gated())
    with pytest.raises(ModelError, match=r'"gated" add .*, which is no fixed matrix .* choose the format peft'):
        of.export(tmp_path / "out", "a", moved(of), format="merged")
    assert of.export(tmp_path / "out", "a", moved(of)).kind == "celora"


def test_a_tensor_that_finds_no_module_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, real = shared(tmp_path, "llama"), export.plain_lora

    def misnamed(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        state = {name.replace("base_model.model.model.", "base_model.model."): w for name, w in found.state.items()}
        config = LoraConfig(**{**found.config.to_dict(), "target_modules": ["q_proj"]})
        return plain_lora.PlainLora(found.rank, found.prefix, config, state)

    monkeypatch.setattr(export, "plain_lora", misnamed)
    with pytest.raises(
        ModelError, match=r"LlamaForSequenceClassification: 6 tensors find no module, such as base_model"
    ):
        of.export(tmp_path / "out", "a", moved(of))
    assert not (tmp_path / "out").exists()


def test_a_module_that_finds_no_tensor_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, real = shared(tmp_path, "llama"), export.plain_lora

    def wide(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        config = LoraConfig(**{**found.config.to_dict(), "target_modules": ["q_proj", "v_proj"]})
        return plain_lora.PlainLora(found.rank, found.prefix, config, found.state)

    monkeypatch.setattr(export, "plain_lora", wide)
    with pytest.raises(ModelError, match=r"6 modules find no tensor, such as .*v_proj\.lora_A"):
        of.export(tmp_path / "out", "a", moved(of))


@pytest.mark.parametrize(("by", "message"), [(0.0, "changes nothing"), (1.1, r"gives logits of llama that differ by")])
def test_an_adapter_that_does_something_else_than_was_trained_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float, message: str
) -> None:
    of, real = shared(tmp_path, "llama"), export.plain_lora

    def scaled(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        state = {name: by * w if "lora_B" in name else w for name, w in found.state.items()}
        return plain_lora.PlainLora(found.rank, found.prefix, found.config, state)

    monkeypatch.setattr(export, "plain_lora", scaled)
    with pytest.raises(ModelError, match=rf"the adapter as plain LoRA {message}.*nothing is exported"):
        of.export(tmp_path / "out", "a", moved(of))


def test_an_adapter_that_was_not_trained_is_exported(tmp_path: Path) -> None:
    of = shared(tmp_path, "llama")
    of.export(tmp_path / "out", "a", of.initial)  # B = 0: it changes nothing, and is to change nothing


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_an_export_draws_no_random_number_and_leaves_the_backbone_as_it_was(tmp_path: Path, format: Any) -> None:
    of = shared(tmp_path, "llama")
    weights = moved(of)
    before, state = of.predict("a", weights, TEXTS), torch.get_rng_state()
    of.export(tmp_path / "out", "a", weights, format=format)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, of.predict("a", weights, TEXTS))
