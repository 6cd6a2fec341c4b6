"""celora.models.backbone, loading and targets: loading, targets, pooling, and what is said when it cannot be."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import (
    BertConfig,
    BertModel,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessorPil,
)

from celora.errors import ModelError
from celora.models.backbone import Backbone, load
from celora.models.loading import embedded, quiet
from celora.models.settings import Adapter, Model

VIT = Adapter(targets=("q_proj", "v_proj"))
BUDGET = 1 << 20
TEXTS = ["a cat", "the quick brown fox jumps over the lazy dog", ""]


@cache
def minilm() -> Backbone:
    return load(Model(device="cpu", max_length=8), Adapter(), Path())


@cache
def vit(pooling: Literal["mean", "cls", "last"] = "mean", dropout: bool = False) -> Backbone:
    return load(Model(backbone="random-vit", device="cpu", pooling=pooling, dropout=dropout), VIT, Path())


def tiny_bert(folder: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    with quiet():
        BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(embedded() / name, folder)


def test_the_embedded_encoder_needs_nothing_but_the_package() -> None:
    backbone = minilm()
    assert (backbone.kind, backbone.width, len(backbone.targets)) == ("text", 384, 12)
    assert set(backbone.scalings.values()) == {2.0}
    assert backbone.targets["encoder.layer.0.attention.self.query"] == (384, 384)


def test_loading_is_quiet_and_draws_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    load(Model(device="cpu"), Adapter(), Path())
    load(Model(backbone="random-vit", device="cpu"), VIT, Path())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def test_texts_are_cut_and_never_empty() -> None:
    short, long, empty = minilm().tokenize(TEXTS)
    assert (len(short), len(long), len(empty)) == (4, 8, 2)
    assert minilm().tokenize([]) == []
    with pytest.raises(ModelError, match=r"reads images and has no tokenizer"):
        vit().tokenize(TEXTS)


def test_padding_takes_no_part() -> None:
    ids = minilm().tokenize(TEXTS)
    with torch.no_grad():
        together = minilm().encode(minilm().batch(ids, [0, 1, 2]), {})
        alone = [minilm().encode(minilm().batch(ids, [row]), {}) for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_pooling_takes_the_mean_the_first_or_the_last_token(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    found: dict[str, torch.Tensor] = {}
    for pooling in ("mean", "cls", "last"):
        backbone = load(Model(backbone=str(tmp_path), pooling=pooling, max_length=8, device="cpu"), Adapter(), Path())
        ids = backbone.tokenize(TEXTS)
        with torch.no_grad():
            found[pooling] = backbone.encode(backbone.batch(ids, [0, 1]), {})
    stock = BertModel.from_pretrained(tmp_path)
    for row in (0, 1):
        with torch.no_grad():
            hidden = stock(input_ids=torch.tensor([ids[row]])).last_hidden_state[0]
        for pooling, value in [("mean", hidden.mean(0)), ("cls", hidden[0]), ("last", hidden[-1])]:
            torch.testing.assert_close(found[pooling][row], value, atol=1e-5, rtol=1e-5)


def test_images_are_checked_and_pooled() -> None:
    images = torch.rand(3, 1, 8, 8)
    assert vit().read(images, BUDGET).shape == (1, 8, 8)
    features = {pooling: vit(pooling).encode(vit().batch(images, [0, 2]), {}) for pooling in ("mean", "cls", "last")}
    assert all(found.shape == (2, 64) for found in features.values())
    assert not torch.equal(features["cls"], features["last"])
    with pytest.raises(ModelError, match=r"reads images of shape \(1, 8, 8\); found \(3, 8, 8\)"):
        vit().read(torch.rand(2, 3, 8, 8), BUDGET)
    with pytest.raises(ModelError, match=r"reads images; found texts"):
        vit().read(TEXTS, BUDGET)
    with pytest.raises(ModelError, match=r"reads texts; found images"):
        minilm().read(images, BUDGET)


def test_dropout_draws_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    backbone, batch = vit(dropout=True), vit().batch(torch.rand(4, 1, 8, 8), range(4))
    state = torch.random.get_rng_state()
    one, same, other = (backbone.encode(batch, {}, dropout_seed=seed) for seed in (1, 1, 2))
    plain = backbone.encode(batch, {})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(plain, vit().encode(batch, {}))


def test_the_fingerprint_is_of_the_frozen_weights_alone(tmp_path: Path) -> None:
    wide = load(Model(backbone="random-vit", device="cpu"), Adapter(targets="all-linear", rank=2), Path())
    assert wide.fingerprint() == vit().fingerprint() == vit("cls").fingerprint()
    assert len(wide.targets) == 12
    assert wide.fingerprint() != minilm().fingerprint()
    half = load(Model(backbone="random-vit", device="cpu", dtype="bfloat16"), VIT, Path())
    assert half.fingerprint() != wide.fingerprint()
    assert half.encode(half.batch(torch.rand(2, 1, 8, 8), [0, 1]), {}).dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("query",), 6),
        (("encoder.layer.0.attention.self.query",), 1),
        (r".*\.layer\.[45]\..*\.(query|key)", 4),
        ("all-linear", 36),  # the pooling layer is gone: it would be adapted in vain
    ],
)
def test_targets_follow_pefts_conventions(targets: tuple[str, ...] | str, count: int) -> None:
    assert len(load(Model(device="cpu"), Adapter(targets=targets), Path()).targets) == count


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_proj",),
            r"\['q_proj'\] matches 0 modules in minilm\. .*query \(6\), key \(6\), value \(6\), dense \(18\)",
        ),
        (("query", "valu"), r"\['valu'\] matches 0 modules in minilm\. Did you mean value\?"),
        ("layers.*", r'"layers.\*" matches 0 modules'),
        ("(", "no regular expression"),
        (("LayerNorm",), "a LayerNorm; expected linear modules"),
        ((), "matches 0 modules"),
    ],
)
def test_targets_that_match_nothing_list_what_would_have(targets: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(Model(device="cpu"), Adapter(targets=targets), Path())


def test_a_local_folder_is_looked_up_from_the_base(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "tiny")
    backbone = load(Model(backbone="tiny", max_length=16, device="cpu"), Adapter(rank=2, alpha=3), tmp_path)
    assert (backbone.width, backbone.source) == (16, str(tmp_path / "tiny"))
    assert set(backbone.scalings.values()) == {1.5}
    with pytest.raises(ModelError, match=r"max_length = 33, but tiny reads at most 32"):
        load(Model(backbone="tiny", max_length=33, device="cpu"), Adapter(), tmp_path)


def test_an_incomplete_folder_says_what_it_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_bert(folder)
    model = Model(backbone="tiny", max_length=16, device="cpu")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(weights).items() if "layer.1" not in k}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: it lacks 16 weights, such as encoder.layer.1"):
        load(model, Adapter(), tmp_path)
    weights.write_bytes(whole[:5000])
    with pytest.raises(ModelError, match=r"cannot be loaded: found .*config.json"):
        load(model, Adapter(), tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded: found .*config.json"):
        load(model, Adapter(), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no config.json; found"):
        load(model, Adapter(), tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "a b"])
def test_a_missing_folder_says_what_is_possible(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r'no such folder .* expected "minilm"'):
        load(Model(backbone=name), Adapter(), tmp_path)


def test_no_socket_is_opened_unless_the_hub_may_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    load(Model(device="cpu"), Adapter(), Path())
    with pytest.raises(ModelError, match=r"to ask the Hub, set model\.allow_download = true"):
        load(Model(backbone="nobody/no-such-model"), Adapter(), tmp_path)
    assert not asked


def test_a_model_in_the_hub_cache_is_loaded_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bert(tmp_path / "models--me--tiny" / "snapshots" / "abc")
    refs = tmp_path / "models--me--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = load(Model(backbone="me/tiny", max_length=16, device="cpu"), Adapter(), tmp_path / "elsewhere")
    assert (backbone.width, backbone.source) == (16, "me/tiny")


@pytest.mark.parametrize(("device", "message"), [("gpu9", "unknown"), ("cuda", "no CUDA device")])
def test_a_device_that_is_not_there(device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match=message):
        load(Model(backbone="random-vit", device=device), VIT, Path())


@pytest.mark.parametrize(("kind", "config"), [(ResNetModel, ResNetConfig), (RegNetModel, RegNetConfig)])
def test_an_image_backbone_of_any_size_takes_the_size_that_its_processor_makes(
    kind: Any, config: Any, tmp_path: Path
) -> None:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        width = {"groups_width": 8} if config is RegNetConfig else {}
        kind(config(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], **width)).save_pretrained(tmp_path)
    model = Model(backbone=str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match=r"no image_size, so the size of its images is unknown: save its processor"):
        load(model, Adapter(targets="all-linear", rank=2), Path())
    ViTImageProcessorPil(size={"height": 64, "width": 48}).save_pretrained(tmp_path)
    backbone = load(model, Adapter(targets="all-linear", rank=2), Path())
    assert backbone.image_shape == (3, 64, 48)
    assert backbone.positions == 8 * 6  # an eighth of each side
    inputs = backbone.read(torch.rand(2, 3, 80, 60), BUDGET)
    features = backbone.encode(backbone.batch(inputs, [0, 1]), {})
    assert features.shape == (2, 32) and bool(features.isfinite().all())
    square = load(replace(model, image_size=32), Adapter(targets="all-linear", rank=2), Path())
    assert square.image_shape == (3, 32, 32)


def test_a_download_takes_the_chat_template_and_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **how: Any) -> str:
        asked.update(how)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = Model(backbone="some/model", device="cpu", allow_download=True)
    with pytest.raises(ModelError, match="could not be had from the Hub"):
        load(model, Adapter(), tmp_path)
    files = [
        "config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "modeling_own.py",
        "pytorch_model.bin",
        "onnx/a.json",
    ]
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == ["config.json", "chat_template.jinja", "tokenizer.model"]
