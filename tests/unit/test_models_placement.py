"""Where a backbone's weights lie and in how many bits: bfloat16, bitsandbytes, device maps; on five families."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from celora.core.adapters import Lora
from celora.errors import ConfigError, ModelError
from celora.experiment.config import resolve
from celora.experiment.engines import ENGINES
from celora.experiment.exports import ClientExport
from celora.experiment.population import ResourceCache
from celora.models import placement
from celora.models.backbone import Backbone, load
from celora.models.placement import INSTALL
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone, SharedBackbone
from celora.tasks.causal_lm import CausalLm
from tests.large import LANGUAGE, TARGETS, batch, loaded, saved, start, stepped

ROOT = Path(__file__).parents[2]
packed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason=f"needs bitsandbytes: {INSTALL} (or the extra `quantise`)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("family", TARGETS)
def test_a_backbone_in_bfloat16_trains_float32_adapters(family: str, folder: Path) -> None:
    half, single = loaded(folder, family, dtype="bfloat16"), loaded(folder, family)
    assert (half.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert all(weight.dtype == torch.bfloat16 for weight in half._whole.parameters() if weight.numel())
    weights = start(half)
    (losses, gradient), (exact, expected) = stepped(half, weights), stepped(single, weights)
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    for one, other in zip(gradient, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98


def unpacked(folder: Path, family: str, backbone: Backbone) -> Backbone:
    """A backbone of plain weights that are what the packed ones stand for."""
    import bitsandbytes as bnb

    plain = loaded(folder, family)
    for path, module in backbone._transformer.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            else:
                module(torch.zeros(1, module.in_features))  # its first call moves the scales
                weight = module.weight.data * module.state.SCB.unsqueeze(1) / 127
            own = plain._transformer.get_submodule(path)
            own.weight.copy_(weight.T if isinstance(own, Conv1D) else weight)  # type: ignore[operator]
    return plain


@packed
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_layers_do_what_the_weights_they_stand_for_do(family: str, bits: str, folder: Path) -> None:
    backbone = loaded(folder, family, quantise=bits)
    plain, weights = unpacked(folder, family, backbone), start(backbone)
    assert backbone.targets == plain.targets
    (losses, gradient), (exact, expected) = stepped(backbone, weights), stepped(plain, weights)
    close = 1e-4 if bits == "4bit" else 5e-3  # layers of 8 bits round what they read, too
    torch.testing.assert_close(losses, exact, rtol=close, atol=close)
    for one, other in zip(gradient, expected, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 1 - close
    assert not torch.allclose(losses, stepped(loaded(folder, family), weights)[0], rtol=1e-5)


@packed
def test_clients_of_a_backbone_in_4_bits_share_passes_and_get_their_own_numbers(folder: Path) -> None:
    backbone = loaded(folder, "llama", quantise="4bit", gradient_checkpointing=True)
    assert AdaptedBackbone(backbone, Lora()).joins
    weights = start(backbone, clients=2)
    losses, gradient = stepped(backbone, weights)
    for client in range(2):
        own = {name: weight[client] for name, weight in weights.items()}
        torch.testing.assert_close(losses[2 * client :][:2], stepped(backbone, own)[0][2 * client :][:2])
    assert all(one.isfinite().all() and one.abs().max() > 0 for one in gradient)


@packed
def test_clients_of_a_backbone_in_8_bits_share_no_pass_as_it_looks_for_outliers_in_all_rows(folder: Path) -> None:
    import bitsandbytes as bnb

    assert not AdaptedBackbone(loaded(folder, "llama", quantise="8bit"), Lora()).joins
    layer = bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    row, other = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    together = layer(torch.stack([row, 20 * other]))[0]
    assert (together - layer(row.unsqueeze(0))[0]).abs().max() > 1e-4


@packed
def test_the_head_of_a_language_model_is_not_packed_and_answers(folder: Path) -> None:
    backbone = loaded(folder, "llama", quantise="4bit")
    assert backbone.head is not None
    assert len(backbone.answers([[2, 9, 8], [2, 7]], {}, 4)) == 2
    assert type(backbone.head._linear) is torch.nn.Linear
    assert sum("4bit" in type(module).__name__ for module in backbone._transformer.modules()) >= 14


@packed
def test_packed_weights_have_a_fingerprint_of_their_own(folder: Path) -> None:
    kinds = [loaded(folder, "vit", quantise=bits).fingerprint() for bits in (None, "4bit", "8bit")]
    assert len(set(kinds)) == 3


@packed
def test_starts_from_the_weights_need_the_weights(folder: Path) -> None:
    backbone = loaded(folder, "vit", quantise="8bit")
    with pytest.raises(ModelError, match=r"weight of .*q_proj is packed or on the disk: use another adapter\.init"):
        backbone.weight(next(iter(backbone.targets)))


@packed
def test_a_device_that_bitsandbytes_does_not_know_is_told(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r'"4bit" on the device "meta": bitsandbytes knows cpu, .*drop model\.quantise'
    ):
        loaded(folder, "llama", quantise="4bit", device="meta")


def test_a_missing_package_is_an_error_that_names_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"needs the package bitsandbytes, which is not installed: {INSTALL}$"):
        loaded(folder, "llama", quantise="4bit")


def test_the_command_installs_the_version_that_is_tried() -> None:
    tried = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert INSTALL.split()[-1] in tried


@pytest.mark.parametrize(
    ("more", "which"), [({"quantise": "4bit"}, "quantise"), ({"device_map": "auto"}, "device_map")]
)
def test_backbones_that_are_made_here_are_not_large(more: dict[str, Any], which: str) -> None:
    with pytest.raises(ModelError, match=f'model.{which} is for backbones that are read from files; "random-vit" is'):
        load(Model(backbone="random-vit", **more), Adapter(targets=("q_proj",)), Path())


def spread(family: str, folder: Path) -> dict[str, str]:
    """Everything on the CPU but the second layer, which stays in its file."""
    backbone = loaded(folder, family)
    paths = {path for path, _ in backbone._whole.named_parameters()}
    upper = f".{next(iter(p for p in paths if '.1.' in p)).split('.1.')[0].rpartition('.')[2]}.1."
    found: dict[str, str] = {}
    for path in paths:
        plain = f".{path.replace('.base_layer', '')}"
        found[plain.rpartition(".")[0].strip(".") or plain.strip(".")] = "disk" if upper in plain else "cpu"
    return {**found, "lm_head": "cpu"}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", LANGUAGE)
def test_a_layer_that_stays_on_the_disk_gives_the_same_bits(family: str, again: bool, folder: Path) -> None:
    where = spread(family, folder)
    assert set(where.values()) == {"cpu", "disk"}
    backbone, plain = loaded(folder, family, device_map=where, gradient_checkpointing=again), loaded(folder, family)
    assert any(weight.is_meta for weight in backbone._whole.parameters())
    assert backbone.device == torch.device("cpu")
    weights = start(plain, clients=2)
    (losses, gradient), (exact, expected) = stepped(backbone, weights), stepped(plain, weights)
    assert torch.equal(losses, exact) and all(map(torch.equal, gradient, expected))
    assert backbone.answers([[2, 9, 8]], {}, 3) == plain.answers([[2, 9, 8]], {}, 3)
    assert backbone.fingerprint() == plain.fingerprint()
    assert any(weight.is_meta for weight in backbone._whole.parameters())


def test_an_export_leaves_the_file_of_a_layer_on_the_disk_as_it_is(folder: Path, tmp_path: Path) -> None:
    backbone, file = loaded(folder, "llama", device_map=spread("llama", folder)), folder / "llama" / "model.safetensors"
    before, settings = file.read_bytes(), Adapter(targets=("q_proj",), rank=2)
    model = Model(backbone=str(folder / "llama"), max_length=32)
    of = SharedBackbone(backbone, CausalLm(), model=model, adapter=settings, family=Lora(), seed=0)
    done = of.export(tmp_path / "out", "a", start(backbone))
    assert (done.kind, done.tried) == ("peft", False)
    assert "not tried, as layers of the backbone are on the disk" in str(ClientExport("a", done))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(ModelError, match=r"leaves layers of .*llama on the disk, .*: choose the format peft"):
        of.export(tmp_path / "whole", "a", start(backbone), format="merged")
    assert file.read_bytes() == before


def test_activations_below_a_layer_on_the_disk_are_kept(folder: Path) -> None:
    from celora.models.activation_cache import ActivationCache

    backbone = loaded(folder, "llama", layers="last:1", device_map=spread("llama", folder))
    ran = [vars(layer).get("forward") for layer in backbone.layers]
    cache = ActivationCache(backbone, 1 << 20)
    assert not cache.notices
    rows = {**batch(backbone), "row": torch.arange(4)}
    with torch.no_grad():
        with cache.replayed(rows):
            kept = backbone.encode(rows, {})
        torch.testing.assert_close(kept, loaded(folder, "llama").encode(rows, {}))
    assert [vars(layer).get("forward") for layer in backbone.layers] == ran  # accelerate's own are back


@pytest.mark.parametrize("where", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("family", TARGETS)
def test_one_device_for_all_is_a_map_too(family: str, where: Any, folder: Path) -> None:
    backbone, plain = loaded(folder, family, device_map=where), loaded(folder, family)
    assert torch.equal(stepped(backbone, start(plain))[0], stepped(plain, start(plain))[0])


def test_a_map_that_forgets_modules_is_told(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"llama cannot be loaded: .*does not give any device for .*model\.layers"):
        loaded(folder, "llama", device_map={"model.embed_tokens": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, r"model: device: found 'cpu' beside device_map.*remove one"),
        ({"device_map": {}}, r"device_map: found nothing in it"),
        ({"own": ["cnn-1"], "quantise": "4bit"}, r"quantise cannot be set with own: .*a frozen backbone; remove it"),
        ({"own": ["cnn-1"], "gradient_checkpointing": True}, r"gradient_checkpointing cannot be set with own"),
        ({"quantise": "2bit"}, r"model\.quantise: found '2bit', expected '4bit' or '8bit'"),
    ],
)
def test_settings_that_do_not_go_together_are_told(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"model": table, "algorithm": {"name": "fedit"}}, Path())


def test_pissa_does_not_start_from_rounded_weights() -> None:
    tree = {"model": {"quantise": "4bit"}, "adapter": {"init": "pissa"}, "algorithm": {"name": "fedit"}}
    with pytest.raises(
        ConfigError, match=r"found 'pissa' with model\.quantise = '4bit', but A and B would start from r"
    ):
        resolve(tree, Path())


def test_engines_with_a_backbone_in_each_process_refuse_a_map() -> None:
    experiment = resolve({"model": {"device_map": "auto"}, "algorithm": {"name": "fedit"}}, Path())
    with pytest.raises(ConfigError, match=r"device_map: with the engine 'flower-sim' each of .*the engine 'embedded'"):
        ENGINES["flower-sim"].load()().check(experiment, ResourceCache())


def test_sites_are_not_told_which_devices_they_have() -> None:
    experiment = resolve({"model": {"device_map": {"": "cpu"}}, "algorithm": {"name": "fedit"}}, Path())
    server = ENGINES["sites"].load()("127.0.0.1:0", None, 1, 1.0)
    with pytest.raises(ConfigError, match=r"device_map: found a mapping, which names the devices of one machine"):
        server.check(experiment, ResourceCache())
