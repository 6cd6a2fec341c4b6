"""A decoder's classifier is that of transformers: last token, no bias, and stock PEFT loads it whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from celora.core.adapters import Lora, Tri
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.core.task import Task
from celora.models.backbone import load
from celora.models.batching import BatchedForward
from celora.models.export import load_export
from celora.models.learner import ModelLearner
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tasks.classify import Classify
from celora.tasks.multilabel import MultiLabel
from celora.tasks.regress import Regress
from celora.tensors import only, part
from tests.facts.test_models import TEXTS, run_readme, stock
from tests.unit.test_models_architectures import ARCHITECTURES, saved
from tests.unit.test_solve import close

DECODERS = ["gpt2", "opt", "gpt-neox", "llama", "mistral", "qwen2", "gemma", "gemma3", "falcon"]
ENCODERS = ["bert", "roberta", "distilbert", "modernbert", "deberta-v2", "xlnet"]
THREE = Classify(classes=("a", "b", "c"))
ROOM = 1 << 20


def models(folder: Path, name: str, task: Task = THREE, family: Any = None, **settings: Any) -> SharedBackbone:
    """A tiny decoder whose every adapter changes something."""
    if not (folder / name).exists():
        saved(ARCHITECTURES[name].config, folder / name)
    of = ARCHITECTURES[name]
    model = Model(backbone=name, device="cpu", max_length=32, **settings)
    adapter = Adapter(targets=of.pattern or (of.suffix,), rank=2)
    backbone = load(model, adapter, folder)
    return SharedBackbone(backbone, task, model=model, adapter=adapter, family=family or Lora(), seed=0)


def moved(of: SharedBackbone, by: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: w + by * torch.randn(w.shape, generator=draw) for name, w in of.initial.items()}


@pytest.mark.parametrize("name", DECODERS)
def test_stock_peft_gives_the_logits_of_a_decoders_classifier_from_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    of = models(tmp_path, name, family=Tri())
    weights = moved(of)
    assert {n: tuple(w.shape) for n, w in weights.items() if part(n) == "head"} == {
        "head.weight": (3, ARCHITECTURES[name].width)
    }
    of.export(tmp_path / "out", "a", weights)
    ours, theirs = of.predict("a", weights, TEXTS), run_readme(tmp_path / "out", monkeypatch)
    assert (ours - theirs["logits"]).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)
    frozen = {n: w for n, w in weights.items() if part(n) == "head"}
    assert (ours - of.predict("a", frozen, TEXTS)).abs().max() > 1e-2  # or the adapter would prove nothing
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert "base_model.model.score.weight" in keys
    assert set(keys) <= {key.replace(".default", "").replace("modules_to_save.", "")
                         for key in theirs["model"].state_dict()}  # fmt: skip
    assert not (tmp_path / "out" / "head.safetensors").exists()
    again, plain = load_export(tmp_path / "out")
    assert plain and torch.equal(again["head.weight"], weights["head.weight"])
    read = models(tmp_path, name)
    assert (read.predict("a", again, TEXTS) - ours).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_pooled_by_the_mean_and_their_heads_have_a_bias(tmp_path: Path, name: str) -> None:
    of = models(tmp_path, name)
    assert of._backbone.pooling == "mean"
    assert set(of.initial) >= {"head.weight", "head.bias"}


def test_a_decoder_may_be_pooled_otherwise_and_is_then_no_class_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = models(tmp_path, "llama", pooling="mean")
    weights = moved(of)
    assert "head.bias" in weights
    of.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    assert (of.predict("a", weights, TEXTS) - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"


def test_a_head_with_a_bias_of_an_older_run_is_exported_beside_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = models(tmp_path, "llama", pooling="last")
    weights = {**moved(of), "head.bias": torch.tensor([3.0, -2.0, 1.0])}
    of.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    assert (of.predict("a", weights, TEXTS) - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)
    assert (theirs - of.predict("a", moved(of), TEXTS)).abs().max() > 1


@pytest.mark.parametrize(
    ("task", "found"), [(Regress(mean=2.5, scale=1.5), "y"), (MultiLabel(classes=("a", "b")), "logits")]
)
def test_numbers_and_several_labels_of_a_decoder_are_exported_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any, found: str
) -> None:
    of = models(tmp_path, "qwen2", task)
    weights = moved(of)
    of.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)[found]
    ours = of.predict("a", weights, TEXTS)
    expected = torch.tensor(task.answers(ours)) if found == "y" else ours
    assert (theirs - expected).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def test_texts_that_end_in_the_padding_token_are_pooled_where_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, "llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A [PAD]", special_tokens=[("[PAD]", 1)])
    tokenizer.save_pretrained(tmp_path / "llama")
    of = models(tmp_path, "llama")
    assert of._backbone.tokenize(["abc"])[0][-1] == 1 != of._backbone.padding
    weights = moved(of)
    of.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)["logits"]
    assert (of.predict("a", weights, TEXTS) - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def test_a_fit_without_a_bias_is_the_same_alone_and_together(tmp_path: Path) -> None:
    of = models(tmp_path, "llama")
    network, weights = AdaptedBackbone(of._backbone, Lora(), budget=ROOM), moved(of)
    examples = THREE.read(_Columns(), network)
    forward, recipe = BatchedForward(network, THREE), Recipe(batch_size=2, steps=3, lr=1e-2)

    def learners() -> list[ModelLearner]:
        return [
            ModelLearner(forward, {"train": Rows(examples, at)}, weights, recipe, seed=0, client=str(at), round=1)
            for at in ([0, 1, 2], [3, 2])
        ]

    asked = [(it, Fit({}, only("B", "head"))) for it in learners()]
    for found, it in zip(Fit.together(asked, forward), learners(), strict=True):  # type: ignore[arg-type]
        alone = Fit({}, only("B", "head")).alone(it)
        assert not isinstance(found, Exception)
        close(found.weights, alone.weights)
        assert not torch.equal(alone.weights["head.weight"], weights["head.weight"])


class _Columns:
    inputs = ("a text", "another one, that is longer", "b", "and the last")
    labels = ("a", "b", "c", "a")
    rows = ()


def test_finding_the_class_draws_no_random_number(tmp_path: Path) -> None:
    saved(ARCHITECTURES["llama"].config, tmp_path / "llama")
    before = torch.get_rng_state()
    models(tmp_path, "llama")
    assert torch.equal(before, torch.get_rng_state())


def test_peft_finds_the_base_by_itself(tmp_path: Path) -> None:
    of = models(tmp_path, "gpt2")
    weights = moved(of)
    of.export(tmp_path / "out", "a", weights)
    with stock():
        model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3).eval()
        model.config.pad_token_id = 1
        ids = AutoTokenizer.from_pretrained(tmp_path / "gpt2")(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**{name: ids[name] for name in ("input_ids", "attention_mask")}).logits
    ours = of.predict("a", weights, TEXTS)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)
