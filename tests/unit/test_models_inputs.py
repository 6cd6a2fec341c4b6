"""celora.models.inputs and image_processor: rows are made when they are first needed, and made again alike."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from celora.core.adapters import Lora
from celora.core.learner import Recipe
from celora.core.problems import Fit
from celora.core.solve import solve
from celora.data import Data, read
from celora.data.inputs import ImageFiles, PixelArrays, Texts
from celora.errors import DataError, ModelError
from celora.models.backbone import Backbone, load
from celora.models.feature_maps import numbers_put_out
from celora.models.inputs import DecodedImages, Inputs, ReadyInputs, TokenisedTexts, collate
from celora.models.learner import ModelLearner
from celora.models.loading import quiet
from celora.models.private_model import PrivateModel
from celora.models.rows import Rows
from celora.models.settings import Adapter, Model
from celora.tensors import but
from tests.classifier import forward, initial
from tests.classifier import rows as rows_of
from tests.toy import image

ROOM = 1 << 20
WORDS = ["a", "text of", "so many words", "and one more of them here"]


class Tokenizer:
    """A text becomes the lengths of its words; the texts of every call are noted."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        self.calls.append(list(texts))
        return [[len(word) for word in text.split()] for text in texts]


def listed(rows: Sequence[Any]) -> list[Any]:
    return [row.tolist() for row in rows]


def test_texts_are_tokenised_once_and_only_those_that_are_asked_for() -> None:
    tokenize = Tokenizer()
    inputs = TokenisedTexts(tokenize, Texts(WORDS), ROOM)
    assert tokenize.calls == []
    assert listed(inputs.fetch([2, 0, 2])) == [[2, 4, 5], [1], [2, 4, 5]]
    assert inputs.lengths([3, 2]) == [6, 3]
    assert listed(inputs.fetch([3, 0])) == [[3, 3, 4, 2, 4, 4], [1]]
    assert tokenize.calls == [[WORDS[2], WORDS[0]], [WORDS[3]]]


def test_ids_beyond_the_budget_are_made_again_and_lengths_are_kept() -> None:
    tokenize = Tokenizer()
    inputs = TokenisedTexts(tokenize, Texts(WORDS), 600)  # room for two rows
    expected = listed(TokenisedTexts(Tokenizer(), Texts(WORDS), ROOM).fetch(range(4)))
    assert inputs.lengths(range(4)) == [1, 2, 3, 6]
    assert [listed(inputs.fetch([row]))[0] for row in (3, 2, 3, 1, 3)] == [expected[row] for row in (3, 2, 3, 1, 3)]
    assert tokenize.calls == [WORDS, [WORDS[1]]]  # 2 and 3 were kept; 2, used less recently than 3, made room for 1
    assert inputs.lengths(range(4)) == [1, 2, 3, 6]
    assert len(tokenize.calls) == 2


def test_what_is_kept_stays_within_the_budget() -> None:
    texts = Texts("word " * (row % 50 + 1) for row in range(2000))
    inputs = TokenisedTexts(Tokenizer(), texts, 100_000)
    inputs.lengths(range(2000))
    kept = inputs._kept
    assert kept._held == sum(row.nbytes + 256 for row in kept._rows.values())
    assert 99_000 < kept._held <= 100_000


@pytest.mark.parametrize(("largest", "dtype"), [(65535, "uint16"), (65536, "int32")])
def test_ids_take_two_bytes_where_they_can(largest: int, dtype: str) -> None:
    (row,) = TokenisedTexts(lambda _: [[1, largest]], Texts(["x"]), ROOM).fetch([0])
    assert (str(row.dtype), row.tolist()) == (dtype, [1, largest])


def test_a_batch_of_texts_is_padded_and_whole_numbers_of_pixels_are_divided_by_255() -> None:
    batch = collate([np.array([5, 6, 7], dtype=np.uint16), np.array([70000], dtype=np.int32)], 9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [70000, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3)
    assert collate([pixels.numpy()], 0)["pixel_values"].flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert collate([pixels.float().numpy()], 0)["pixel_values"].flatten().tolist() == [0, 51, 255]


def learner(inputs: Inputs, backbone: Backbone, **recipe: Any) -> ModelLearner:
    """A client with these rows, every other of which is of class 1."""
    rows = rows_of(inputs, torch.arange(len(inputs)) % 2)
    start = initial(backbone, Adapter(rank=2), Lora(), 2, seed=0)
    splits: dict[Any, Rows] = {"train": rows}
    return ModelLearner(forward(backbone, Lora()), splits, start, Recipe(**recipe), seed=0, client="a", round=1)


def trained(inputs: Inputs, backbone: Backbone) -> list[bytes]:
    """What a client finds, bit by bit."""
    it = learner(inputs, backbone, batch_size=4, lr=1e-2)
    (fitted,) = solve([(it, turn())])
    return [*image(fitted.weights), *image(it.features()[0]), *image(it.test(fitted.weights, "train"))]


def turn() -> Any:
    return (yield from Fit({}, but()))


def test_training_does_not_depend_on_the_budget() -> None:
    backbone = load(Model(device="cpu", max_length=16), Adapter(rank=2, layers="last:1"), Path())
    texts = [f"{'word ' * (row % 7)} and {row}" for row in range(24)]
    expected = trained(ReadyInputs(backbone.tokenize(texts)), backbone)
    for budget in (0, 3000, ROOM):
        assert trained(backbone.read(Texts(texts), budget), backbone) == expected


def test_few_steps_tokenise_few_of_many_rows() -> None:
    backbone = load(Model(device="cpu", max_length=16), Adapter(rank=2), Path())
    tokenize = Tokenizer()
    inputs = TokenisedTexts(tokenize, Texts(f"row {row}" for row in range(5000)), ROOM)
    it = learner(inputs, backbone, batch_size=4, steps=2)
    assert [len(batch["labels"]) for batch in it.batches()] == [4, 4]
    assert sum(map(len, tokenize.calls)) <= 3 * 8 * 4  # windows of eight batches


def picture(height: int, width: int, mode: str, seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(draw.integers(256, size=shape, dtype=np.uint8), mode)


def stored(folder: Path, pictures: Sequence[Image.Image]) -> ImageFiles:
    """Images as the data package reads them from a Parquet file."""
    rows = []
    for one in pictures:
        file = io.BytesIO()
        one.save(file, "PNG")
        rows.append({"image": file.getvalue(), "label": "x"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    table = read(Data(source="rows.parquet", image="image"), folder)
    assert isinstance(table.inputs, ImageFiles)
    return table.inputs


def vit(folder: Path, channels: int = 3, processor: dict[str, Any] | None = None) -> Backbone:
    """A tiny vision transformer for images of 16 × 16 pixels, with an image processor if its settings are given."""
    config = ViTConfig(
        image_size=16, patch_size=8, num_channels=channels, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    with quiet():
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
        if processor is not None:
            ViTImageProcessorPil(**processor).save_pretrained(folder / "vit")
    return load(Model(backbone="vit", device="cpu"), Adapter(targets="all-linear"), folder)


OWN: dict[str, Any] = {
    "size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25],
}  # fmt: skip


def test_images_go_through_the_processor_that_the_model_brings(tmp_path: Path) -> None:
    pictures = [picture(20, 24, "RGB", 0), picture(31, 9, "L", 1), picture(16, 16, "RGB", 2)]
    backbone = vit(tmp_path, processor=OWN)
    inputs = backbone.read(stored(tmp_path, pictures), ROOM)
    with quiet():
        own = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    expected = own([one.convert("RGB") for one in pictures], return_tensors="pt")["pixel_values"]
    found = backbone.batch(inputs, range(3))["pixel_values"]
    assert found.shape == (3, 3, 16, 16)
    assert torch.equal(found, expected)
    assert inputs.notices == ()
    assert found.min() < 0
    assert backbone.encode({"pixel_values": found}, {}).shape == (3, 16)


def test_a_model_of_one_channel_sees_grey_images(tmp_path: Path) -> None:
    pictures = [picture(20, 24, "RGB", 0), picture(20, 24, "L", 1)]
    backbone = vit(tmp_path, channels=1, processor={**OWN, "image_mean": [0.5], "image_std": [0.2]})
    found = backbone.batch(backbone.read(stored(tmp_path, pictures), ROOM), range(2))["pixel_values"]
    resized = [np.asarray(one.convert("L").resize((16, 16), Image.Resampling.BILINEAR)) / 255 for one in pictures]
    expected = torch.tensor((np.stack(resized) - 0.5) / 0.2).unsqueeze(1).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_grey_numbers_become_rgb_images_for_a_model_of_three_channels(tmp_path: Path) -> None:
    backbone = vit(tmp_path, processor=OWN)
    inputs = backbone.read(PixelArrays(torch.full((2, 1, 8, 8), 0.6)), ROOM)
    found = backbone.batch(inputs, [1])["pixel_values"]
    expected = (0.6 - torch.tensor(OWN["image_mean"])) / torch.tensor(OWN["image_std"])
    torch.testing.assert_close(found[0, :, 3, 5], expected, atol=1e-5, rtol=0)


def test_without_a_processor_pixels_are_divided_by_255_and_that_is_told(tmp_path: Path) -> None:
    backbone = vit(tmp_path)
    images = stored(tmp_path, [picture(16, 16, "RGB", 0)])
    inputs = backbone.read(images, ROOM)
    assert torch.equal(backbone.batch(inputs, [0])["pixel_values"][0], images[0].float() / 255)
    assert inputs.notices == ("pixels are divided by 255: vit brings no image processor (preprocessor_config.json)",)


def test_without_a_processor_images_must_be_alike_and_as_large_as_the_model_reads(tmp_path: Path) -> None:
    backbone, sizes = vit(tmp_path), [(16, 16), (16, 16), (12, 16)]
    unlike = stored(tmp_path, [picture(*size, "RGB", 0) for size in sizes])
    message = r"rows\.parquet:3: found an image of 12 × 16 pixels, expected 16 × 16 as before; resize them alike\."
    with pytest.raises(DataError, match=message):
        backbone.read(unlike, ROOM)
    with pytest.raises(DataError, match=message):
        PrivateModel("cnn-5", Model(device="cpu"), Path(), seed=0).read(unlike, ROOM)
    with pytest.raises(ModelError, match=r"reads images of shape \(3, 16, 16\); found \(3, 12, 12\)"):
        backbone.read(stored(tmp_path, [picture(12, 12, "RGB", 0)]), ROOM)


def test_a_processor_that_does_not_fit_its_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vit, a ViTModel, makes no features of images alone: .*24\*24.*16\*16"):
        vit(tmp_path, processor={**OWN, "size": {"height": 24, "width": 24}})
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json cannot be read as an image processor"):
        vit(tmp_path)


def test_a_processor_that_leaves_sizes_as_they_are_needs_images_alike(tmp_path: Path) -> None:
    backbone = vit(tmp_path, processor={**OWN, "do_resize": False})
    assert backbone.image_shape == (3, 16, 16)
    inputs = backbone.read(stored(tmp_path, [picture(16, 16, "RGB", 0), picture(16, 24, "RGB", 0)]), ROOM)
    assert inputs.fetch([0])[0].shape == (3, 16, 16)
    with pytest.raises(ModelError, match=r"makes \(3, 16, 24\) of image 2, and \(3, 16, 16\) of the first"):
        inputs.fetch([1])


def test_a_backbone_reads_images_as_large_as_its_processor_makes_them(tmp_path: Path) -> None:
    """DINOv2's positions are of 518 × 518 pixels, its processor makes 224 × 224."""
    config = Dinov2Config(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2
    )
    with quiet():
        Dinov2Model(config).save_pretrained(tmp_path / "dino")
    ViTImageProcessorPil(**OWN).save_pretrained(tmp_path / "dino")
    backbone = load(Model(backbone="dino", device="cpu"), Adapter(targets="all-linear"), tmp_path)
    batch = backbone.batch(backbone.read(stored(tmp_path, [picture(9, 40, "RGB", 0)]), ROOM), [0])
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert backbone.image_tokens == 5
    assert backbone.encode(batch, {}).shape == (1, 16)


def convnext(folder: Path, processor: Any, **settings: Any) -> Backbone:
    """A tiny network that reads images of any size."""
    config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=32)
    with quiet():
        ConvNextModel(config).save_pretrained(folder / "net")
    if processor is not None:
        processor.save_pretrained(folder / "net")
    return load(Model(backbone="net", device="cpu", **settings), Adapter(targets="all-linear"), folder)


def test_image_size_takes_the_place_of_the_processors_own(tmp_path: Path) -> None:
    backbone = convnext(tmp_path, BitImageProcessorPil(), image_size=48)  # of itself it crops 224 × 224
    batch = backbone.batch(backbone.read(stored(tmp_path, [picture(50, 90, "RGB", 0)]), ROOM), [0])
    assert batch["pixel_values"].shape == (1, *backbone.image_shape) == (1, 3, 48, 48)
    assert backbone.image_tokens == 36
    assert backbone.encode(batch, {}).shape == (1, 8)


def test_image_size_is_refused_where_nothing_makes_images_of_that_size(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"image_size = 48, but .*net brings no image processor"):
        convnext(tmp_path, None, image_size=48)
    with pytest.raises(ModelError, match=r"^model.image_size = 48: ConvNextImageProcessorPil makes no squares \("):
        convnext(tmp_path, ConvNextImageProcessorPil(), image_size=48)


def test_a_pass_of_convolutions_is_measured_by_what_its_modules_put_out() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)))
    assert numbers_put_out(net, {"input": torch.zeros(3, 1, 8, 8)}) == 3 * 16 * (4 + 4 + 2)


def test_images_are_decoded_again_alike_beyond_the_budget(tmp_path: Path) -> None:
    images = stored(tmp_path, [picture(16, 16, "RGB", seed) for seed in range(3)])
    none, all_ = DecodedImages(images, None, 0), DecodedImages(images, None, ROOM)
    for rows in ([0, 2], [1], [2, 2]):
        assert listed(none.fetch(rows)) == listed(all_.fetch(rows)) == listed([images[row] for row in rows])
    assert (len(none._kept._rows), len(all_._kept._rows)) == (0, 3)
    assert all_.lengths([0, 1]) == [1, 1]


def test_rows_of_another_kind_are_refused_before_any_is_read(tmp_path: Path) -> None:
    minilm = load(Model(device="cpu", max_length=16), Adapter(rank=2), Path())
    with pytest.raises(ModelError, match="minilm reads texts; found images: choose another"):
        minilm.read(stored(tmp_path, [picture(16, 16, "RGB", 0)]), ROOM)
    with pytest.raises(ModelError, match="vit reads images; found texts: choose another"):
        vit(tmp_path).read(Texts(["a"]), ROOM)
