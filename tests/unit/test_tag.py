"""celora.tasks.tag and entities: a tag for each word, learned at its first piece, scored word by word and by entity."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.data import Data, read
from celora.errors import DataError, ModelError
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import load
from celora.models.batching import BatchedForward
from celora.models.export import load_export
from celora.models.learner import ModelLearner
from celora.models.loading import embedded
from celora.models.model_zoo import ModelZoo
from celora.models.private_model import PrivateModel
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tasks.entities import entities
from celora.tasks.tag import Tag
from celora.tensors import but, only, part
from tests.facts.test_models import run_readme, stock
from tests.unit.test_models_architectures import ARCHITECTURES, saved

ROWS: list[dict[str, Any]] = [
    {"tokens": ["Ada", "Lovelace", "lived", "in", "London"], "tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
    {"tokens": ["Unbelievably", ",", "it", "rained"], "tags": ["O", "O", "O", "O"]},
    {"tokens": ["Paris"], "tags": ["B-LOC"]},
    {"tokens": ["Antidisestablishmentarianism", "pleased", "Grace", "Hopper"], "tags": ["O", "O", "B-PER", "I-PER"]},
    {
        "tokens": ["So", "it", "goes", ",", "on", "and", "on", ",", "from", "Rome", "to", "Oslo"],
        "tags": ["O"] * 9 + ["B-LOC", "O", "B-LOC"],
    },
]
NAMES = ("B-LOC", "B-PER", "I-PER", "O")
ROOM = 1 << 20
README_ROWS = [["some", "words"], ["and", "others"]]


def table(tmp_path: Path, rows: Any = ROWS) -> Any:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read(Data(source="rows.jsonl"), tmp_path, Tag().forms)


def shared(tmp_path: Path, name: str = "minilm", layers: str = "all", **settings: Any) -> SharedBackbone:
    model = Model(backbone=name, device="cpu", **settings)
    targets = "auto" if name == "minilm" else (ARCHITECTURES[name].suffix,)
    adapter = Adapter(layers=layers, rank=4, targets=targets)
    if name != "minilm" and not (tmp_path / name).exists():
        saved(ARCHITECTURES[name].config, tmp_path / name)
    task = Tag(classes=NAMES)
    backbone = load(model, adapter, tmp_path)
    return SharedBackbone(backbone, task, model=model, adapter=adapter, family=Lora(), seed=0, budget=ROOM)


def moved(of: SharedBackbone, by: float = 0.1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: w + by * torch.randn(w.shape, generator=draw) for name, w in of.initial.items()}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", ""),
        ("O O", ""),
        ("B-PER I-PER O B-LOC", "PER:0-2 LOC:3-4"),
        ("B-PER B-PER", "PER:0-1 PER:1-2"),
        ("I-PER I-PER", "PER:0-2"),  # conlleval: an entity need not begin with B
        ("O I-PER", "PER:1-2"),
        ("B-PER I-LOC", "PER:0-1 LOC:1-2"),
        ("B-PER O I-PER", "PER:0-1 PER:2-3"),
        ("B-PER I-PER B-PER I-PER", "PER:0-2 PER:2-4"),
        ("S-PER I-PER", "PER:0-1 PER:1-2"),
        ("B-PER E-PER I-PER", "PER:0-2 PER:2-3"),
        ("S-PER S-PER", "PER:0-1 PER:1-2"),
        ("NOUN NOUN VERB O", "NOUN:0-2 VERB:2-3"),
        ("B-ART-X I-ART-X", "ART-X:0-2"),
    ],
)
def test_entities_are_those_of_conlleval(tags: str, expected: str) -> None:
    found = sorted(entities(tags.split()), key=lambda one: one[1])
    assert " ".join(f"{kind}:{first}-{end}" for kind, first, end in found) == expected


def test_metrics_are_counted_over_words_and_entities_of_all_rows() -> None:
    task, names = Tag(classes=NAMES), {name: at for at, name in enumerate(NAMES)}
    true = ["B-PER I-PER O O B-LOC", "O B-LOC"]
    said = ["B-PER I-PER O B-LOC O", "O B-LOC"]
    tags = torch.full((2, 5), -100)
    logits, losses = torch.full((2, 5, 4), math.nan), list[float]()
    draw = torch.Generator().manual_seed(0)
    for row, (one, other) in enumerate(zip(true, said, strict=True)):
        for word, (right, answer) in enumerate(zip(one.split(), other.split(), strict=True)):
            tags[row, word] = names[right]
            logits[row, word] = torch.rand(4, generator=draw)
            logits[row, word, names[answer]] = 2.0
            losses.append(F.cross_entropy(logits[row, word], tags[row, word]).item())
    numbers = torch.arange(1, 6).expand(2, 5).clone()
    batch = {"tags": tags, "word_numbers": numbers}
    found = task.measure(task.outcomes(logits, batch))
    # 3 true entities, 3 answered, 2 right; 5 of 7 words right
    assert found["entity_f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["loss"] == pytest.approx(sum(losses) / 7)
    total, count = task.losses(logits, batch, None)
    assert (total / count).item() == pytest.approx(found["loss"])
    assert task.count(batch) == count == 7
    halves = task.losses(logits, batch, 2)
    assert halves[0].sum().item() == pytest.approx(total.item()) and halves[1].tolist() == [5, 2]
    nothing = task.measure(task.outcomes(logits[:1, 2:3], {"tags": tags[:1, 2:3], "word_numbers": numbers[:1, :1]}))
    assert (nothing["entity_f1"], nothing["accuracy"]) == (0, 1)


def test_a_word_is_learned_at_its_first_piece(tmp_path: Path) -> None:
    of, rows = shared(tmp_path), table(tmp_path)
    examples = of._task.read(rows, of)
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    words = [row["tokens"] for row in ROWS]
    expected = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    forward = BatchedForward(of._network, of._task)
    batch = forward.batch(Rows(examples, range(5)), range(5))
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert (expected["input_ids"].ne(tokenizer.pad_token_id).sum(1) > torch.tensor([len(w) + 2 for w in words])).any()
    with stock(), torch.no_grad():
        options = {name: expected[name] for name in ("input_ids", "attention_mask")}
        states = AutoModel.from_pretrained(embedded())(**options).last_hidden_state
    head = of.initial
    outputs = forward.outputs({n: w for n, w in head.items() if n.startswith("head")}, batch)
    for row, own in enumerate(words):
        ids = expected.word_ids(row)
        at = [ids.index(word) for word in range(len(own))]
        logits = states[row, at] @ head["head.weight"].T + head["head.bias"]
        assert (outputs[row, : len(own)] - logits).abs().max() < 1e-5
        assert outputs[row, len(own) :].isnan().all()
    assert [[NAMES[tag] for tag in row if tag >= 0] for row in batch["tags"].tolist()] == [row["tags"] for row in ROWS]


def test_words_that_do_not_fit_are_neither_learned_nor_scored_and_a_notice_says_so(tmp_path: Path) -> None:
    of, rows = shared(tmp_path, max_length=8), table(tmp_path)
    examples = of._task.read(rows, of)
    assert examples.inputs.notices == (
        "3 of 5 rows do not fit into model.max_length; words at their end are neither learned nor scored",
    )
    forward = BatchedForward(of._network, of._task)
    batch = forward.batch(Rows(examples, range(5)), [4])
    assert forward.count(batch) == 6
    assert of._task.outcomes(forward.outputs(of.initial, batch), batch)[0, 1:3][0] == 6
    assert [len(tags) for tags in of.answers("a", of.initial, [ROWS[4]["tokens"], ROWS[2]["tokens"]])] == [6, 1]


def test_predictions_have_a_tag_for_each_word_whatever_passes_they_are_made_in(tmp_path: Path) -> None:
    of = shared(tmp_path)
    weights, words = moved(of), [row["tokens"] for row in ROWS]
    found = of.answers("a", weights, words)
    assert [len(tags) for tags in found] == [len(row) for row in words]
    assert found == [of.answers("a", weights, [row])[0] for row in words]
    long = [["word"] * size for size in (1, 100, 3, 120, 7)]  # of unlike length, so in several passes
    assert [len(tags) for tags in of.answers("a", weights, long)] == [1, 100, 3, 120, 7]
    odd = of.answers("a", weights, [["Paris", "\u200b", "rains"]])[0]
    assert odd[1] is None and odd[0] in NAMES and odd[2] in NAMES
    assert of.answers("a", weights, [ROWS[0]]) == [found[0]]


@pytest.mark.parametrize("name", ["minilm", "llama", "xlnet"])
def test_losses_gradients_and_scores_are_the_same_alone_and_together(tmp_path: Path, name: str) -> None:
    of = shared(tmp_path, name, layers="last:1", max_length=40)
    examples, weights, clients = of._task.read(table(tmp_path), of), moved(of), ([0, 1, 2], [2, 3, 4, 1, 0])
    forward = BatchedForward(of._network, of._task)
    trained = [name for name in weights if part(name) in ("B", "head")]
    batches = [forward.batch(Rows(examples, range(5)), at) for at in clients]

    def derived(held: Any, batch: Any) -> tuple[Any, Any]:
        held = {name: w.clone().requires_grad_(name in trained) for name, w in held.items()}
        losses = forward.losses(held, batch)
        return losses, torch.autograd.grad(losses.sum(), [held[name] for name in trained])

    alone = [derived(weights, batch) for batch in batches]
    if of._network.joins:
        losses, gradients = derived({n: torch.stack([w, w]) for n, w in weights.items()}, forward.join(batches))
        for client, (loss, own) in enumerate(alone):
            torch.testing.assert_close(losses[client], loss, atol=1e-5, rtol=1e-5)
            for found, expected in zip(gradients, own, strict=True):
                torch.testing.assert_close(found[client], expected, atol=1e-5, rtol=1e-4)
    recipe = Recipe(batch_size=3, steps=2)

    def learners() -> list[ModelLearner]:
        return [
            ModelLearner(forward, {"train": Rows(examples, at)}, weights, recipe, seed=0, client=str(at), round=1)
            for at in clients
        ]

    fits = [Fit({}, only("B", "head")) for _ in clients]
    for found, it in zip(Fit.together(list(zip(learners(), fits, strict=True)), forward), learners(), strict=True):
        assert not isinstance(found, Exception)
        assert found.metrics["loss"] == pytest.approx(fits[0].alone(it).metrics["loss"], abs=1e-5)
        assert not torch.equal(found.weights["head.weight"], weights["head.weight"])
    together = forward.scores([(it, weights, "train", None) for it in learners()])
    for one, it in zip(together, learners(), strict=True):
        assert one == pytest.approx(it.test(weights, "train"), abs=1e-5)


def test_activations_of_words_are_kept_without_changing_a_bit(tmp_path: Path) -> None:
    of, rows, found = shared(tmp_path, layers="last:1"), table(tmp_path), []
    for activations in (ActivationCache(of._backbone, ROOM << 6), ActivationCache(of._backbone, 0)):
        network = AdaptedBackbone(of._backbone, Lora(), activations, ROOM)
        examples = of._task.read(rows, network)
        recipe = Recipe(batch_size=3, steps=3)
        forward = BatchedForward(network, of._task)
        it = ModelLearner(forward, {"train": Rows(examples, range(5))}, moved(of), recipe, seed=0, client="a", round=1)
        found.append(Fit({}, but()).alone(it).weights)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", ["minilm", "roberta", "distilbert", "gpt2", "llama", "qwen2", "modernbert", "opt"])
def test_the_code_of_an_exports_readme_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    of = shared(tmp_path, name, max_length=32)
    weights = moved(of, 0.3)
    of.export(tmp_path / "out", "a", weights)
    theirs = run_readme(tmp_path / "out", monkeypatch)
    ours = of.predict("a", weights, README_ROWS)
    for row, words in enumerate(README_ROWS):
        ids = theirs["inputs"].word_ids(row)
        at = [ids.index(word) for word in range(len(words))]
        assert (theirs["logits"][row, at] - ours[row]).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)
    frozen = {n: w for n, w in weights.items() if n.startswith("head")}
    assert (ours - of.predict("a", frozen, README_ROWS)).abs().max() > 1e-2  # or the adapter would prove nothing
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == ("FEATURE_EXTRACTION" if name in ("modernbert", "opt") else "TOKEN_CLS")
    again, plain = load_export(tmp_path / "out")
    assert plain and torch.equal(again["head.weight"], weights["head.weight"])
    assert torch.equal(again["head.bias"], weights["head.bias"])


def test_rows_that_are_not_as_they_should_be_are_named(tmp_path: Path) -> None:
    short = {"tokens": ["a", "b"], "tags": ["O"]}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: found 2 words and 1 tags, expected one tag for each word"):
        Tag().propose(table(tmp_path, [ROWS[0], short]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: found tags = '\[1, 2\]', expected a list of texts"):
        Tag().propose(table(tmp_path, [{"tokens": ["a", "b"], "tags": [1, 2]}]))
    with pytest.raises(DataError, match=r"found the label 'B-PER', which task\.classes does not list"):
        Tag(classes=("O", "B-LOC", "I-PER")).propose(table(tmp_path))
    with pytest.raises(ModelError, match=r"found 'a text' at row 1; expected a list of words"):
        shared(tmp_path).predict("a", {}, ["a text"])


def test_networks_that_read_no_words_are_refused(tmp_path: Path) -> None:
    rows = table(tmp_path)
    task = Tag(classes=NAMES)
    images = load(Model(backbone="random-vit", device="cpu"), Adapter(targets="all-linear"), tmp_path)
    with pytest.raises(ModelError, match="random-vit has no tokenizer that tells which word a piece is of"):
        task.read(rows, AdaptedBackbone(images, Lora()))
    own = Model(own=("minilm:1",), device="cpu")
    zoo = ModelZoo([PrivateModel("minilm:1", own, tmp_path, 0)], task, adapter=Adapter(), family=Lora(), seed=0)
    with pytest.raises(ModelError, match=r"keeps no tokens apart: set model\.backbone to one that does"):
        task.read(rows, zoo)


def test_the_baseline_is_the_most_frequent_tag() -> None:
    train, test = {"tags": torch.tensor([[3, 3, 0], [3, -100, -100]])}, {"tags": torch.tensor([[3, 0], [1, -100]])}
    assert Tag(classes=NAMES, score="accuracy").baseline(train, test) == pytest.approx(1 / 3)
    assert Tag(classes=NAMES).baseline(train, test) == 0
    assert Tag(classes=NAMES, score="loss").baseline(train, test) is None


def test_the_tags_are_agreed_on_as_classes_are(tmp_path: Path) -> None:
    task, rows = Tag(), table(tmp_path)
    first = Tag().propose(table(tmp_path, ROWS[:1]))
    assert task.agreed(task.merge(task.merge(b"", first), task.propose(rows))).classes == NAMES
    assert task.head(8) == {}
    assert {name: of.shape for name, of in Tag(classes=NAMES).head(8).items()} == {
        "head.weight": (4, 8), "head.bias": (4,),
    }  # fmt: skip
