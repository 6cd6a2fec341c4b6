"""Pairs of texts: read where `data.columns` names the second, joined as the tokenizer joins them, typed as it says."""

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.data import Data, read
from celora.data.inputs import Records, Texts
from celora.errors import DataError, ModelError
from celora.models import families
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone, load
from celora.models.batching import BatchedForward
from celora.models.export import export_shared
from celora.models.learner import ModelLearner
from celora.models.loading import embedded, quiet
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tasks.classify import Classify
from celora.tensors import but, only
from tests.facts.test_models import stock
from tests.unit.test_solve import close

PAIRS = [
    ("A cat sat on the mat.", "An animal sat."),
    ("yes", "A rather longer text that goes on and on, of many words, and does not end where one would think it ends"),
    ("Rain fell.", "no"),
    ("It is late, and the shops are closed by now.", "The shops are open."),
    ("a", "b"),
]
ROOM = 1 << 20


@cache
def minilm(layers: Any = "last:1") -> Backbone:
    return load(Model(device="cpu", max_length=24), Adapter(layers=layers), Path())


def table(tmp_path: Path, **settings: Any) -> Any:
    (tmp_path / "rows.csv").write_text("text,pair,label\nA cat,An animal,yes\nA dog,A car,no\nA dog,,no\n")
    return read(Data(source="rows.csv", **settings), tmp_path)


def test_a_column_of_pairs_is_read_where_it_is_named_and_only_there(tmp_path: Path) -> None:
    alone = table(tmp_path)
    assert isinstance(alone.inputs, Texts) and list(alone.inputs) == ["A cat", "A dog", "A dog"]
    pairs = table(tmp_path, columns={"pair": "pair"})
    assert isinstance(pairs.inputs, Records)
    assert list(pairs.inputs) == [{"text": "A cat", "pair": "An animal"}, {"text": "A dog", "pair": "A car"}]
    assert pairs.notices == ("rows.csv: 1 row without a pair was left out (first: line 4)",)
    with pytest.raises(DataError, match=r"no column 'second'.* Set `columns\.pair = \"…\"` in \[data\]"):
        table(tmp_path, columns={"pair": "second"})


def test_pairs_are_the_tokenizers_own_and_the_longer_text_is_cut(tmp_path: Path) -> None:
    backbone = minilm()
    inputs = backbone.read(PAIRS, ROOM)
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    texts, others = map(list, zip(*PAIRS, strict=True))
    options = {"truncation": "longest_first", "max_length": 24, "padding": True, "return_tensors": "pt"}
    expected = tokenizer(texts, others, **options)
    batch = backbone.batch(inputs, range(5))
    assert set(batch) == set(expected) == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert batch["token_type_ids"].any() and batch["input_ids"].shape[1] == 24
    assert inputs.lengths(range(5)) == expected["attention_mask"].sum(1).tolist()
    with stock():
        states = AutoModel.from_pretrained(embedded())(**expected).last_hidden_state
    mask = expected["attention_mask"].unsqueeze(-1)
    features = backbone.encode(batch, {})
    assert (features - (states * mask).sum(1) / mask.sum(1)).abs().max() < 1e-5
    untyped = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    assert (features - backbone.encode(untyped, {})).abs().max() > 1e-3  # or types would prove nothing
    records = backbone.read(table(tmp_path, columns={"pair": "pair"}).inputs, ROOM)
    own = tokenizer("A dog", "A car")
    assert records.fetch([1])[0].tolist() == [own["input_ids"], own["token_type_ids"]]


def test_texts_alone_have_no_types() -> None:
    backbone = minilm()
    inputs = backbone.read(["a text", "b"], ROOM)
    assert [row.tolist() for row in inputs.fetch([0, 1])] == backbone.tokenize(["a text", "b"])
    assert set(backbone.batch(inputs, [0, 1])) == {"input_ids", "attention_mask"}


def test_a_model_without_types_reads_pairs_without_them(tmp_path: Path) -> None:
    with quiet():
        config = RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokens = AutoTokenizer.from_pretrained(embedded(), model_input_names=["input_ids", "attention_mask"])
    tokens.save_pretrained(tmp_path / "roberta")
    backbone = load(Model(backbone="roberta", device="cpu", max_length=24), Adapter(), tmp_path)
    inputs = backbone.read(PAIRS, ROOM)
    assert set(backbone.batch(inputs, range(5))) == {"input_ids", "attention_mask"}
    assert inputs.fetch([4])[0].tolist() == tokens("a", "b")["input_ids"]


@pytest.mark.parametrize("row", [("one",), ("one", 2), {"text": "one"}])
def test_what_is_no_pair_is_named(row: Any) -> None:
    with pytest.raises(ModelError, match=r"at row 2; expected a pair of texts, \(text, pair\)"):
        minilm().read([PAIRS[0], row], ROOM).fetch([0, 1])


def learners(activations: ActivationCache | None = None, layers: str = "last:1") -> list[ModelLearner]:
    """Two clients with pairs of unlike length, one of them in common."""
    network = AdaptedBackbone(minilm(layers), Lora(), activations, ROOM)
    task = Classify(classes=("no", "yes"))
    examples = task.read(_Columns(), network)
    weights = families.initial(minilm(layers).targets, Adapter(rank=4), Lora(), task.head(network.width), seed=0)
    draw = torch.Generator().manual_seed(1)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
    forward, recipe = BatchedForward(network, task), Recipe(batch_size=3, steps=3)
    return [
        ModelLearner(forward, {"train": Rows(examples, at)}, weights, recipe, seed=0, client=str(at), round=1)
        for at in ([0, 1, 2], [2, 3, 4])
    ]


class _Columns:
    inputs = PAIRS
    labels = ("yes", "no", "no", "yes", "no")


def test_a_fit_on_pairs_is_the_same_alone_and_together() -> None:
    asked = [(it, Fit({}, only("B", "head"))) for it in learners()]
    together = Fit.together(asked, asked[0][0].shared)  # type: ignore[arg-type]
    for found, it in zip(together, learners(), strict=True):
        alone = Fit({}, only("B", "head")).alone(it)
        assert not isinstance(found, Exception)
        assert found.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-5)
        close(found.weights, alone.weights)


def test_activations_of_pairs_are_kept_without_changing_a_bit() -> None:
    cache = ActivationCache(minilm(), ROOM << 6)
    assert not cache.notices
    kept, anew = (Fit({}, but()).alone(learners(activations)[0]).weights for activations in (cache, None))
    assert all(torch.equal(kept[name], anew[name]) for name in kept)


def test_predictions_of_pairs_are_those_of_the_code_in_an_exports_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter, task = Model(device="cpu", max_length=24), Adapter(layers="last:1"), Classify(classes=("no", "yes"))
    backbone = minilm()
    models = SharedBackbone(backbone, task, model=model, adapter=adapter, family=Lora(), seed=0)
    draw = torch.Generator().manual_seed(2)
    weights = {name: w + 0.1 * torch.randn(w.shape, generator=draw) for name, w in models.initial.items()}
    export_shared(
        tmp_path / "out", backbone, weights, family=Lora(), card=task.model_card(), model=model, adapter=adapter
    )
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    texts, others = map(list, zip(*PAIRS, strict=True))
    code = code.replace('["a text", "and another one"]', repr(texts)).replace(
        "(texts, **options)  # of pairs: tokenizer(texts, pairs, **options | dict(return_token_type_ids=True))",
        f"(texts, {others!r}, **options | dict(return_token_type_ids=True))",
    )
    assert repr(others) in code
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with stock():
        theirs: Tensor = runpy.run_path("snippet.py")["logits"]
    ours = models.predict("a", weights, PAIRS)
    assert (ours - theirs).abs().max() < 1e-5
    assert models.answers("a", weights, PAIRS) == [("no", "yes")[at] for at in theirs.argmax(1).tolist()]
