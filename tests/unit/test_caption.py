"""celora.tasks.caption and celora.models.seeing_backbone: models of images and texts that answer in words."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from peft import PeftModel

from celora.core.adapters import Lora
from celora.data import Data, read
from celora.errors import ConfigError, DataError, ModelError
from celora.experiment.config import resolve
from celora.models.batching import BatchedForward
from celora.models.export import load_export
from celora.models.fingerprint import of_files
from celora.models.loading import quiet
from celora.models.rows import Rows, join
from celora.models.seeing_backbone import load_seeing
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import SharedBackbone
from celora.models.stock import trial
from celora.tasks.caption import Caption
from tests.facts.test_models import stock
from tests.image_text import SEEING, saved_seeing, write_pictures
from tests.language import saved

ROOM = 1 << 20
COMPOSED = "random-vit-rgb + llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caption")
    write_pictures(folder / "rows.parquet")
    for family in SEEING:
        saved_seeing(folder / family, family)
    saved(folder / "llama")
    with quiet():
        t.ViTModel(t.ViTConfig(
            image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        )).save_pretrained(folder / "random-vit-rgb")  # fmt: skip
    return folder


def shared(folder: Path, family: str, task: Caption | None = None, **adapter: Any) -> SharedBackbone:
    chosen = Model(backbone=family, device="cpu", max_length=64)
    of = Adapter(rank=2, targets=("q_proj",), **adapter)
    backbone = load_seeing(chosen, of, folder)
    return SharedBackbone(backbone, task or Caption(), model=chosen, adapter=of, family=Lora(), seed=0, budget=ROOM)


def moved(models: SharedBackbone, seed: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: w + 0.2 * torch.randn(w.shape, generator=draw) for name, w in models.initial.items()}


def rows(folder: Path) -> Any:
    return read(Data(source="rows.parquet", image="image"), folder, Caption().forms)


def batch_of(models: SharedBackbone, table: Any, chosen: list[int]) -> dict[str, torch.Tensor]:
    examples = Caption().read(table, models)
    return {**models._network.batch(examples.inputs, chosen), **examples.targets(chosen)}


@pytest.mark.parametrize("family", SEEING)
def test_the_loss_is_the_familys_own(family: str, folder: Path) -> None:
    models, table = shared(folder, family), rows(folder)
    batch = batch_of(models, table, [0, 1, 2])
    found = Caption().outputs(models._network._encoded({}, batch, None), {}, batch)
    assert [models._network.texts([ids[ids >= 0].tolist()])[0] for ids in batch["labels"]] == [
        row["completion"] for row in (table.inputs[at] for at in range(3))
    ]
    with quiet():
        whole = t.AutoModelForImageTextToText.from_pretrained(folder / family).eval()
    backbone: Any = models._backbone
    with torch.no_grad():
        logits = whole(**backbone.accepted(batch)).logits
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(found[:, 1:], expected, atol=1e-5, rtol=1e-5)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    seen = Caption().outputs(models._network._encoded({}, other, None), {}, other)
    assert (seen[0] - found[0]).abs().max() > 1e-6  # the image is read


@pytest.mark.parametrize("family", [*SEEING, COMPOSED])
def test_clients_in_one_pass_are_as_alone_and_answer_as_alone(family: str, folder: Path) -> None:
    models, table = shared(folder, family), rows(folder)
    network, task = models._network, Caption(answer_tokens=4)
    own = [moved(models, seed) for seed in (1, 2)]
    batches = [batch_of(models, table, chosen) for chosen in ([0, 1, 2], [4, 5])]
    fillers = {name: target.filler for name, target in task.targets.items()}
    alone = [task.losses(network.outputs(task, w, b), b, None) for w, b in zip(own, batches, strict=True)]
    together = {name: torch.stack([w[name] for w in own]) for name in own[0]}
    batch = join(batches, fillers)
    sums, counts = task.losses(network.outputs(task, together, batch), batch, 2)
    torch.testing.assert_close(sums, torch.stack([total for total, _ in alone]), atol=1e-4, rtol=1e-5)
    assert counts.tolist() == [int(count) for _, count in alone]
    answers = [models.answers("a", w, _asked(table, [0, 1])) for w in own]
    prompts = [task.inputs(_asked(table, [0, 1]), models) for _ in own]
    joined = join([network.batch(p, [0, 1]) for p in prompts], {})
    ids = [p.fetch([row])[0].tolist() for p in prompts for row in (0, 1)]  # type: ignore[attr-defined]
    assert network.answers(together, ids, 64, joined) == [*answers[0], *answers[1]]


@pytest.mark.parametrize("family", ["llava", COMPOSED])
def test_clients_with_unequal_splits_generate_as_alone(family: str, folder: Path) -> None:
    task = Caption(answer_tokens=6, score="rouge_l")
    models, table = shared(folder, family, task), rows(folder)
    forward, examples, said = BatchedForward(models._network, task), task.read(table, models), list[list[str]]()
    backbone: Any = models._backbone
    answers = backbone.answers
    backbone.answers = lambda *asked: said.append(answers(*asked)) or said[-1]
    parts = [Rows(examples, [0, 1]), Rows(examples, [4, 5, 6])]
    asked: list[Any] = [
        (SimpleNamespace(rows=lambda _, of=of: of, initial={}), moved(models, seed), "test", None)
        for seed, of in enumerate(parts, 1)
    ]
    alone = [forward.scores([one])[0] for one in asked]
    assert list(map(len, said)) == [2, 3]
    together = forward.scores(asked)
    (grouped,) = said[2:]  # one pass, whose third row only fills up
    assert [grouped[:2], grouped[3:]] == said[:2]
    assert together == [pytest.approx(one, rel=1e-4) for one in alone]


def _asked(table: Any, chosen: list[int]) -> list[dict[str, Any]]:
    return [{"image": table.inputs.images[at], "prompt": table.inputs[at]["prompt"]} for at in chosen]


def test_answers_are_those_of_stock_generation(folder: Path) -> None:
    models, table = shared(folder, "llava", Caption(answer_tokens=6)), rows(folder)
    found = models.answers("a", models.initial, _asked(table, [0, 1, 2]))
    with quiet():
        whole = t.AutoModelForImageTextToText.from_pretrained(folder / "llava").eval()
        processor = t.AutoProcessor.from_pretrained(folder / "llava")
    for at, answer in enumerate(found):
        image = table.inputs.images[at]
        inputs = processor(text=["<image>what is it?"], images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")
        ids = whole.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.decode(ids, skip_special_tokens=True).strip()


def test_messages_have_their_image_where_the_template_puts_it(folder: Path) -> None:
    models = shared(folder, "qwen2-vl")
    said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "red"}]
    table = rows(folder)
    row = {"image": table.inputs.images[0], "messages": said}
    made = models.seen([row], lambda one, see: Caption()._written(models.tokenizer, one, see))
    ids = made.fetch([0])[0].tolist()
    words = t.AutoTokenizer.from_pretrained(folder / "qwen2-vl")
    assert words.convert_ids_to_tokens(ids)[:7] == [
        "<user>",
        "<|vision_start|>",
        *["<|image_pad|>"] * 4,
        "<|vision_end|>",
    ]
    labels = made.targets([0])["labels"][0]
    assert words.decode(labels[labels >= 0]) == "red<end>"


def test_a_row_is_never_cut_inside_its_image(folder: Path) -> None:
    models = shared(folder, "llava")
    tokenizer = models.tokenizer
    tokenizer.most = 16
    see = lambda text: [59] * 4 + [7] * len(text)  # noqa: E731
    made = Caption()._written(tokenizer, {"prompt": "abcdefgh", "completion": "abcdefgh"}, see)
    assert (len(made.ids), made.cut, sum(made.is_target)) == (16, 5, 4)
    with pytest.raises(DataError, match=r"image and prompt are 20 tokens, expected fewer than model.max_length = 16"):
        Caption()._written(tokenizer, {"prompt": "a" * 16, "completion": "b"}, see)


def test_places_of_an_image_cannot_be_predicted(folder: Path) -> None:
    tree: dict[str, Any] = {
        "data": {"source": "rows.parquet", "image": "image", "client": "site"},
        "task": {"name": "caption", "loss_on": "everything"},
        "model": {"backbone": "llava"},
        "algorithm": {"name": "fedit"},
    }
    with pytest.raises(ConfigError, match=r"task.loss_on: found 'everything', expected 'response'"):
        resolve(tree, folder)
    models = shared(folder, COMPOSED)
    batch = batch_of(models, rows(folder), [0, 1])
    places = batch["input_ids"] == models._backbone._transformer.placeholder  # type: ignore[union-attr]
    assert places.any()
    assert not (places & (batch["labels"] >= 0)).any()


@pytest.mark.parametrize(
    ("adapter", "task", "expected"),
    [
        ({"projector": True}, "classify", r"adapter.projector: found true, but only a model of images and texts"),
        ({"projector": True}, "contrast", r'expected task.name = "caption", or false'),
        ({"towers": "image"}, "caption", r"adapter.towers: found 'image', but only a dual encoder has two towers"),
    ],
)
def test_settings_that_the_model_would_not_read_are_refused(
    adapter: dict[str, Any], task: str, expected: str, folder: Path
) -> None:
    tree = {"data": {"source": "rows.parquet"}, "task": {"name": task}, "adapter": adapter,
            "algorithm": {"name": "fedit"}}  # fmt: skip
    with pytest.raises(ConfigError, match=expected):
        resolve(tree, folder)


@pytest.mark.parametrize("family", SEEING)
def test_the_projector_can_be_trained_whole_and_travels_with_the_adapter(
    family: str, folder: Path, tmp_path: Path
) -> None:
    models, table = shared(folder, family, projector=True), rows(folder)
    assert all(name.startswith("head.") for name in models.initial if not name.endswith((".A", ".B")))
    assert any(name.startswith("head.") for name in models.initial)
    weights = moved(models)
    models.export(tmp_path / "export", "a", weights)
    again, plain = load_export(tmp_path / "export")
    assert plain
    assert all(torch.equal(again[name], weights[name]) for name in weights if name.startswith("head."))
    batch = batch_of(models, table, [0, 1])
    found = Caption().outputs(models._network._encoded(weights, batch, None), weights, batch)
    with stock():
        base = t.AutoModelForImageTextToText.from_pretrained(folder / family)
        whole = PeftModel.from_pretrained(base, str(tmp_path / "export")).eval()
    backbone: Any = models._backbone
    with torch.no_grad():
        logits = whole.get_base_model()(**backbone.accepted(batch)).logits
    labels = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(found[:, 1:], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "format"), [("llava", "peft"), ("llava", "merged"), ("paligemma", "peft"), (COMPOSED, "peft")]
)
def test_the_code_in_the_readme_gives_celoras_answer_in_any_folder(
    family: str, format: Any, folder: Path, tmp_path: Path
) -> None:
    models = shared(folder, family, Caption(answer_tokens=6))
    weights = moved(models)
    exported = models.export(tmp_path / "export", "a", weights, format=format, pad=True)
    assert exported.generates == (family != COMPOSED)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    with stock(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", DeprecationWarning)  # PaliGemma's processor makes arrays of tensors
        patch.chdir(tmp_path)
        if family == COMPOSED:
            names["GIVEN"] = torch.zeros(1, 3, 16, 16)
            code = re.sub(r"torch\.rand\(1, [\d, ]+\)", "GIVEN", code)
        exec(code, names)
    side = 16 if family == COMPOSED else 96
    asked = [{"image": torch.zeros(3, side, side, dtype=torch.uint8), "prompt": "a prompt"}]
    assert [names["answer"].strip()] == models.answers("a", weights, asked)


def test_what_sees_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_seeing(Model(backbone="llama"), Adapter(targets=("q_proj",)), folder)
    with pytest.raises(ModelError, match="found llama, which reads texts; expected an image encoder"):
        load_seeing(Model(backbone="llama + llama"), Adapter(targets=("q_proj",)), folder)
    with pytest.raises(
        ModelError, match=r"found a.gguf, but a GGUF file holds a model of texts; expected a model such"
    ):
        load_seeing(Model(backbone="a.gguf"), Adapter(targets=("q_proj",)), folder)


@pytest.mark.parametrize("family", SEEING)
def test_adapter_and_projector_are_merged_and_tried_with_an_image(family: str, folder: Path, tmp_path: Path) -> None:
    models = shared(folder, family, projector=True)
    backbone: Any = models._backbone
    of = trial(backbone, moved(models), family=Lora(), start={}, fits=None)
    assert "pixel_values" in of.rows
    models.export(tmp_path / "export", "a", moved(models), format="merged")
    with stock():
        whole = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "export").eval()
        of.check(whole, "it")
        with pytest.raises(ModelError, match=r"it gives logits of .* that differ by"):
            of.check(t.AutoModelForImageTextToText.from_pretrained(folder / family).eval(), "it")


def test_a_composition_cannot_be_merged(folder: Path, tmp_path: Path) -> None:
    models = shared(folder, COMPOSED)
    with pytest.raises(ModelError, match=r"is put together here of two models, .*: choose the format peft"):
        models.export(tmp_path / "export", "a", models.initial, format="merged")


@pytest.mark.parametrize("quantise", ["4bit", "8bit"])
def test_a_model_that_sees_can_be_packed_but_not_with_its_projector(
    quantise: Any, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="packs weights")
    chosen = Model(backbone="llava", device="cpu", max_length=64, quantise=quantise)
    queries = Adapter(rank=2, targets=("q_proj",))
    backbone = load_seeing(chosen, queries, folder)
    models = SharedBackbone(backbone, Caption(), model=chosen, adapter=queries, family=Lora(), seed=0, budget=ROOM)
    models.export(tmp_path / "export", "a", moved(models))  # stock PEFT puts out the same, or it is an error
    assert "load_in_8bit" in (text := (tmp_path / "export" / "README.md").read_text()) or "load_in_4bit" in text
    with pytest.raises(ModelError, match=r"adapter.projector: found model.quantise beside it"):
        load_seeing(chosen, Adapter(targets=("q_proj",), projector=True), folder)
    with pytest.raises(ModelError, match=r"model.quantise cannot be set with an image encoder and a language model"):
        load_seeing(Model(backbone=COMPOSED, quantise=quantise), queries, folder)


@pytest.mark.parametrize("family", ["llava", COMPOSED])
def test_rows_that_are_no_images_with_texts_are_refused(family: str, folder: Path) -> None:
    models, image = shared(folder, family), torch.zeros(3, 16, 16, dtype=torch.uint8)
    unlike = ["a text", image, {"prompt": "a"}, {"image": "a.png", "prompt": "a"}, {"image": image, "prompt": 3}]
    for row in unlike:
        with pytest.raises(
            ModelError, match=r"reads images with texts; found .* at row 2; expected \{\"image\": a ten"
        ):
            models.answers("a", models.initial, [{"image": image, "prompt": "a"}, row])
    with pytest.raises(ModelError, match=r"reads images with texts; found a Tensor; expected a list of"):
        models.answers("a", models.initial, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("family", SEEING)
def test_a_text_with_places_for_several_images_is_refused(family: str, folder: Path) -> None:
    models, image = shared(folder, family), torch.zeros(3, 16, 16, dtype=torch.uint8)
    mark = "<|image_pad|>" if "qwen" in family else "<image>"
    rows = [{"image": image, "prompt": prompt} for prompt in ("a", f"{mark}a{mark}")]
    with pytest.raises(DataError, match=r"row 2: its image and text cannot be read: found 2 marks '<.*>' in its text"):
        models.answers("a", models.initial, rows)


def test_a_composition_starts_the_same_whatever_its_folders_are_called(folder: Path) -> None:
    names = (COMPOSED, f"{folder / 'random-vit-rgb'} + {folder / 'llama'}")
    one, two = (load_seeing(Model(backbone=name), Adapter(targets=("q_proj",)), folder) for name in names)
    assert one.own_head
    assert all(torch.equal(two.own_head[name], tensor) for name, tensor in one.own_head.items())
    found = one.fingerprint()
    assert found == two.fingerprint()
    two.own_head["head.projector.bias"].add_(1)
    del two._digest
    assert two.fingerprint() != found


def test_a_composition_is_told_from_others_by_both_of_its_models(folder: Path) -> None:
    saved(folder / "other", "qwen2")
    found = [load_seeing(Model(backbone=name), Adapter(targets=("q_proj",)), folder).fingerprint()
             for name in (COMPOSED, COMPOSED, "random-vit-rgb + other", "llava", "paligemma")]  # fmt: skip
    assert found[0] == found[1]
    assert len(set(found)) == 4
    assert found[3] == of_files(folder / "llava", "float32")
