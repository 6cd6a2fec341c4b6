"""celora.models with tiny random models of many architectures: what MiniLM can do they can, or they are refused."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from celora.core.adapters import Lora, modules
from celora.errors import ModelError
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone, load
from celora.models.loading import quiet
from celora.models.settings import Adapter, Model
from celora.models.shared_backbone import AdaptedBackbone

RANK, LENGTH = 2, 40
VOCABULARY = ["[UNK]", "[PAD]", *"abcdefghijklmnopqrstuvwxyz .,:?"]
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": True,
}
IMAGE = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
MAPS = {"image_size": 32, "num_channels": 1}


class Architecture(NamedTuple):
    """A configuration, a suffix of module names that people of this family adapt, and what is expected of it.

    Attributes:
        linear: number of modules that "all-linear" means.
        longest: tokens that a text may have; None where only the tokenizer says.
        kept: whether activations below the first adapted layer can be kept.
        rows_first: whether clients can share a pass.
        pattern: targets, where the suffix is that of other modules, too.
    """

    config: Any
    suffix: str
    linear: int
    width: int = 16
    longest: int | None = 64
    layers: int = 3
    kept: bool = True
    rows_first: bool = True
    pattern: str | None = None


ARCHITECTURES = {
    "bert": Architecture(t.BertConfig(**TEXT), "query", 18),
    "roberta": Architecture(t.RobertaConfig(**TEXT), "query", 18, longest=62),  # positions start behind the padding's
    "albert": Architecture(t.AlbertConfig(**TEXT, embedding_size=8), "query", 7, layers=1),
    "albert-groups": Architecture(
        t.AlbertConfig(**{**TEXT, "num_hidden_layers": 4}, embedding_size=8, num_hidden_groups=2), "query", 13, layers=2
    ),
    "electra": Architecture(t.ElectraConfig(**TEXT, embedding_size=8), "query", 19),
    "distilbert": Architecture(
        t.DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=64),
        "q_lin", 18,
    ),
    "deberta-v2": Architecture(
        t.DebertaV2Config(**TEXT, **DISENTANGLED, norm_rel_ebd="layer_norm"), "query_proj", 18, rows_first=False
    ),
    "mpnet": Architecture(t.MPNetConfig(**TEXT), "q", 18, longest=62),
    "modernbert": Architecture(
        t.ModernBertConfig(**TEXT, local_attention=8, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=0),
        "Wqkv", 12,
    ),
    "gpt2": Architecture(
        t.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0),
        "c_attn", 12,
    ),
    "opt": Architecture(
        t.OPTConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32,
            max_position_embeddings=64, word_embed_proj_dim=8, do_layer_norm_before=False,
        ),
        "q_proj", 20, width=8,
    ),
    "gpt-neox": Architecture(t.GPTNeoXConfig(**TEXT), "query_key_value", 12),
    "llama": Architecture(t.LlamaConfig(**GROUPED), "q_proj", 21),
    "mistral": Architecture(t.MistralConfig(**GROUPED, sliding_window=4), "q_proj", 21),
    "qwen2": Architecture(
        t.Qwen2Config(**TEXT, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "q_proj", 21,
    ),
    "gemma": Architecture(t.GemmaConfig(**GROUPED), "q_proj", 21),
    "gemma3": Architecture(  # texts and images; a text's layers, widths and limits are those of the text model in it
        t.Gemma3Config(
            text_config={**GROUPED, "sliding_window": 4},
            vision_config={**IMAGE, "num_hidden_layers": 9},
            mm_tokens_per_image=4,
        ),
        "q_proj", 21,
    ),
    "falcon": Architecture(
        t.FalconConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=0,
        ),
        "query_key_value", 12,
    ),
    "mixtral": Architecture(t.MixtralConfig(**GROUPED, num_local_experts=4), "q_proj", 12, kept=False),
    "xlnet": Architecture(
        t.XLNetConfig(vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=32), "layer_1", 6,
        longest=None, kept=False, rows_first=False,
    ),
    "longformer": Architecture(
        t.LongformerConfig(**TEXT, attention_window=4), "query", 27, longest=62, kept=False, rows_first=False,
    ),
    "vit": Architecture(t.ViTConfig(**IMAGE), "q_proj", 18),
    "deit": Architecture(t.DeiTConfig(**IMAGE), "q_proj", 18),
    "swin": Architecture(
        t.SwinConfig(
            image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=2
        ),
        "q_proj", 19, layers=2,
    ),
    "dinov2": Architecture(t.Dinov2Config(**IMAGE), "q_proj", 18),
    "convnext": Architecture(
        t.ConvNextConfig(**MAPS, hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, layer_scale_init_value=1.0),
        "pwconv1", 6, layers=2,
    ),
    "mobilenet-v1": Architecture(
        t.MobileNetV1Config(**MAPS, depth_multiplier=0.25), "convolution", 13, width=256, layers=26,
        pattern=r"layer\.\d*[13579]\.convolution",  # every other layer is a depthwise convolution
    ),
    "mobilenet-v2": Architecture(
        t.MobileNetV2Config(**MAPS, depth_multiplier=0.25, finegrained_output=False),
        "expand_1x1.convolution", 34, width=320, layers=16,
    ),
    "efficientnet": Architecture(
        t.EfficientNetConfig(**MAPS, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320),
        "project_conv", 28, width=320, layers=7,
    ),
}  # fmt: skip
TEXTS = [name for name, one in ARCHITECTURES.items() if "image_size" not in one.config.to_dict()]
IMAGES = [name for name in ARCHITECTURES if name not in TEXTS]

Loaded = Callable[..., Backbone]


def saved(config: Any, folder: Path) -> None:
    """A model of random weights, none of them small, and a tokenizer of characters.

    Batch norms have the statistics of some random images, else a deep network hands nothing on.
    """
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = t.AutoModel.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0, 0.3)
        if norms := [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
            for norm in norms:
                norm.momentum = 1.0
                torch.nn.init.ones_(norm.weight)
            with torch.no_grad():
                model.train()(pixel_values=torch.rand(64, config.num_channels, config.image_size, config.image_size))
        model.save_pretrained(folder)
    characters = Tokenizer(WordLevel({token: at for at, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    characters.pre_tokenizer = Split("", "isolated")  # type: ignore[assignment]
    tokens: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    t.PreTrainedTokenizerFast(tokenizer_object=characters, **tokens).save_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """An architecture's backbone, adapted at its suffix or at `targets`; each is loaded once."""
    folder, found = tmp_path_factory.mktemp("architectures"), dict[Any, Backbone]()

    def backbone(name: str, layers: str = "all", targets: tuple[str, ...] | str | None = None) -> Backbone:
        wanted = targets or ARCHITECTURES[name].pattern or (ARCHITECTURES[name].suffix,)
        if not (folder / name).exists():
            saved(ARCHITECTURES[name].config, folder / name)
        if (name, layers, wanted) not in found:
            adapter = Adapter(layers=layers, targets=wanted, rank=RANK)
            model = Model(backbone=name, device="cpu", max_length=LENGTH, pooling="mean")
            found[name, layers, wanted] = load(model, adapter, folder)
        return found[name, layers, wanted]

    return backbone


def rows(backbone: Backbone) -> Any:
    """Six rows: texts of 3 to 40 tokens, or images."""
    draw = torch.Generator().manual_seed(0)
    if backbone.kind == "image":
        return torch.rand(6, *backbone.image_shape, generator=draw)
    return [torch.randint(2, 30, (size,), generator=draw).tolist() for size in (7, 3, 21, 16, LENGTH, 5)]


def numbered(backbone: Backbone, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    return {**backbone.batch(rows(backbone), chosen), "row": torch.tensor(chosen)}


def start(backbone: Backbone, clients: int = 0) -> dict[str, torch.Tensor]:
    """A and B of each adapted module, B not 0; of so many clients, if any are asked for."""
    draw, each = torch.Generator().manual_seed(1), (clients,) if clients else ()
    size, found = 0.1 if backbone.positions else 1.0, {}  # a deep network without attention makes noise of noise
    for name, (d_out, d_in) in backbone.targets.items():
        found[f"{name}.A"] = torch.randn(*each, RANK, d_in, generator=draw) / d_in**0.5
        found[f"{name}.B"] = size * torch.randn(*each, d_out, RANK, generator=draw)
    return found


def encoded(backbone: Backbone, batch: Any, weights: Any) -> torch.Tensor:
    return backbone.encode(batch, {name: partial(Lora().delta, w=w) for name, w in modules(weights).items()})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_found_and_features_are_the_mean_of_what_transformers_gives(name: str, loaded: Loaded) -> None:
    expected, backbone = ARCHITECTURES[name], loaded(name)
    assert len(loaded(name, targets="all-linear").targets) == expected.linear
    assert all(module.endswith(f".{expected.suffix}") for module in backbone.targets)
    assert len(backbone.layers) == expected.layers
    assert backbone.width == expected.width
    batch = backbone.batch(rows(backbone), [0])
    with quiet(), torch.no_grad():
        states = t.AutoModel.from_pretrained(backbone.source).eval()(**batch).last_hidden_state
        mean = states.mean((2, 3)) if states.dim() == 4 else states.mean(1)
        torch.testing.assert_close(backbone.encode(batch, {}), mean, atol=1e-5, rtol=1e-5)
    assert mean.shape == (1, backbone.width)


@pytest.mark.parametrize("name", TEXTS)
def test_padding_does_not_change_the_features_of_a_row(name: str, loaded: Loaded) -> None:
    backbone = loaded(name)
    weights, texts = start(backbone), rows(backbone)
    with torch.no_grad():
        together = encoded(backbone, backbone.batch(texts, range(6)), weights)
        alone = [encoded(backbone, backbone.batch(texts, [row]), weights) for row in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_on_the_adapters_changes_the_features(name: str, loaded: Loaded) -> None:
    backbone = loaded(name)
    batch, weights = numbered(backbone, range(6)), {n: w.requires_grad_() for n, w in start(backbone).items()}
    before = encoded(backbone, batch, weights)
    loss = before[:, 0].sum()
    gradient = torch.autograd.grad(loss, list(weights.values()))
    assert all(g.abs().max() > 0 for g in gradient)
    after = encoded(backbone, batch, {n: w - 1e-2 * g for (n, w), g in zip(weights.items(), gradient, strict=True)})
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_clients_share_a_pass_and_get_their_own_features_where_adapted_modules_read_rows_first(
    name: str, loaded: Loaded
) -> None:
    backbone = loaded(name)
    assert AdaptedBackbone(backbone, Lora()).joins == backbone.rows_first == ARCHITECTURES[name].rows_first
    if not backbone.rows_first:
        return
    weights, batch = start(backbone, clients=2), backbone.batch(rows(backbone), range(6))
    own = [{n: w[client] for n, w in weights.items()} for client in range(2)]
    with torch.no_grad():
        alone = torch.cat([encoded(backbone, batch, one)[3 * k : 3 * k + 3] for k, one in enumerate(own)])
        close = 1e-4 if backbone.positions else 2e-5  # convolutions add up otherwise in another batch
        torch.testing.assert_close(encoded(backbone, batch, weights), alone, atol=close, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_n_adapts_the_top_and_keeps_activations_bit_for_bit_or_says_why_not(name: str, loaded: Loaded) -> None:
    expected = ARCHITECTURES[name]
    backbone = loaded(name, layers="last:1")
    assert backbone.depth == expected.layers - 1
    assert backbone.targets.keys() < loaded(name).targets.keys() or expected.layers == 1
    if not backbone.depth:
        return
    weights = {n: w.requires_grad_() for n, w in start(backbone).items()}
    computed, kept = ActivationCache(backbone, 0), ActivationCache(backbone, 1 << 20)
    assert len(kept.notices) == (not expected.kept)
    for company in ([0, 1, 2, 3], [4, 0], [2], [5, 4, 3, 1, 0], [2, 5]):
        batch, found = numbered(backbone, company), []
        for cache in (computed, kept):
            with cache.replayed(batch):
                features = encoded(backbone, batch, weights)
            found.append([features, *torch.autograd.grad(features.square().sum(), list(weights.values()))])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        torch.testing.assert_close(features, encoded(backbone, batch, weights), atol=2e-5, rtol=1e-4)
    assert bool(kept._kept) == expected.kept


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mixtral", "those of a row depend on the rows beside it"),
        ("xlnet", r"for 1 row of 25 tokens its layers pass on a tensor \(25, 1, 16\), not \(1, 25, d\)"),
        ("longformer", r"for 1 row of 25 tokens its layers pass on a tensor \(1, 28, 16\), not \(1, 25, d\)"),
    ],
)
def test_the_notice_says_why_activations_cannot_be_kept(name: str, why: str, loaded: Loaded) -> None:
    (notice,) = ActivationCache(loaded(name, layers="last:1"), 1).notices
    start = f"activations below the first adapted layer of {name} are computed anew in every pass: "
    assert re.fullmatch(start + why, notice)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_the_longest_length_is_read_and_a_longer_one_refused(name: str, loaded: Loaded) -> None:
    backbone, limit = loaded(name), ARCHITECTURES[name].longest
    if limit is None:
        assert backbone.longest is not None
        assert backbone.longest > 1 << 20
        return
    assert backbone.longest == limit
    with torch.no_grad():
        assert backbone.encode(backbone.batch([[2] * limit], [0]), {}).isfinite().all()
    model = Model(backbone=backbone.source, device="cpu", max_length=limit + 1)
    with pytest.raises(ModelError, match=rf"max_length = {limit + 1}, but .* reads at most {limit}"):
        load(model, Adapter(), Path())


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("vit", "deit", "swin", "dinov2")])
def test_input_norms_of_a_map_are_over_its_positions(name: str, loaded: Loaded) -> None:
    backbone, read = loaded(name), dict[str, torch.Tensor]()
    batch = backbone.batch(rows(backbone), [0, 1])

    def look(path: str) -> Callable[..., None]:
        return lambda module, args: read.update({path: args[0]})

    hooks = [layer.register_forward_pre_hook(look(path)) for path, layer in backbone._adapted.items()]
    squares = backbone.squares(batch)
    for hook in hooks:
        hook.remove()
    for path, found in squares.items():
        over = (0, 2, 3) if path in backbone.convolutions else (0, 1, 2)  # ConvNeXt's are linear, channels last
        assert found.shape == (backbone.targets[path][1],)
        torch.testing.assert_close(found, read[path].double().square().sum(over))


def test_a_map_has_no_token_of_its_class(loaded: Loaded) -> None:
    folder = Path(loaded("convnext").source).parent
    model = Model(backbone="convnext", device="cpu", pooling="cls")
    with pytest.raises(ModelError, match=r'pooling = "cls", but convnext makes a map of an image: use "mean"'):
        load(model, Adapter(targets=("pwconv1",)), folder)


def test_dropout_leaves_the_statistics_of_batch_norms_alone(loaded: Loaded) -> None:
    folder = Path(loaded("mobilenet-v2").source).parent
    backbone = load(Model(backbone="mobilenet-v2", device="cpu", dropout=True), Adapter(targets="all-linear"), folder)
    batch, before = backbone.batch(rows(backbone), range(6)), backbone._transformer.state_dict()
    frozen = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        dropped = backbone.encode(batch, {}, dropout_seed=1)
        assert torch.equal(dropped, backbone.encode(batch, {}))  # it has batch norms, and nothing to drop
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in backbone._transformer.state_dict().items())


@pytest.mark.parametrize("name", TEXTS)
def test_input_norms_leave_padding_out_or_are_refused(name: str, loaded: Loaded) -> None:
    backbone = loaded(name)
    texts = rows(backbone)
    if name in ("xlnet", "longformer"):
        with pytest.raises(ModelError, match=r"reads no tensor \(rows, tokens, width\)"):
            backbone.squares(backbone.batch(texts, range(6)))
        return
    together = backbone.squares(backbone.batch(texts, range(6)))
    alone = [backbone.squares(backbone.batch(texts, [row])) for row in range(6)]
    assert together.keys() == backbone.targets.keys()
    for module, squares in together.items():
        torch.testing.assert_close(squares, sum(one[module] for one in alone), atol=1e-4, rtol=1e-4)


def test_input_norms_count_every_call_of_a_shared_layer(loaded: Loaded) -> None:
    backbone, read = loaded("albert"), list[torch.Tensor]()
    (module,) = backbone.targets
    layer = backbone.layers[0].get_submodule("albert_layers.0.attention.query")
    hook = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    batch = backbone.batch(rows(backbone), [0])
    squares = backbone.squares(batch)[module]
    hook.remove()
    assert len(read) == 3
    torch.testing.assert_close(squares, torch.cat(read, 1).double().square().sum((0, 1)))


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        (
            "albert",
            Adapter(layers="last:2", targets=("query",)),
            r'"last:2": albert has 1 layers with weights of their own',
        ),
        ("swin", Adapter(layers="last:3", targets=("q_proj",)), r'"last:3": swin has 2 layers with weights'),
        (
            "mixtral",
            Adapter(targets=("experts",)),
            r"layers.0.mlp.experts in mixtral, a MixtralExperts; expected linear",
        ),
        (
            "mixtral",
            Adapter(targets=("gate_up_proj",)),
            r"matches 0 modules in mixtral. layers.0.mlp.experts.gate_up_proj is a parameter that belongs to no linear",
        ),
        ("xlnet", Adapter(targets=("q",)), r"layer.0.rel_attn.q is a parameter that belongs to no linear module"),
        ("gemma3", Adapter(targets=("fc1",)), r"\['fc1'\] matches 0 modules in gemma3"),
        (
            "efficientnet",
            Adapter(targets=("depthwise_conv",)),
            r"blocks.0.depthwise_conv in efficientnet, a EfficientNetDepthwiseLayer; expected linear modules: ",
        ),
        (
            "efficientnet",
            Adapter(targets=("embeddings.convolution",)),
            r"embeddings.convolution in efficientnet, a Conv2d of 3 × 3, stride 2 × 2, 1 group; expected linear "
            r"modules or 1 × 1 convolutions of stride 1: reduce \(7\), .*\. Write \"all-linear\" for all of them",
        ),
        ("mobilenet-v2", Adapter(targets=("convolution",)), r"a Conv2d of 3 × 3, stride 2 × 2, 1 group"),
        ("convnext", Adapter(targets=("dwconv",)), r"a Conv2d of 7 × 7, stride 1 × 1, 8 groups; .*: pwconv1 \(3\)"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    name: str, adapter: Adapter, message: str, tmp_path: Path, loaded: Loaded
) -> None:
    folder = Path(loaded(name).source).parent
    with pytest.raises(ModelError, match=message):
        load(Model(backbone=name, device="cpu", max_length=LENGTH), adapter, folder)


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (
            t.CLIPConfig(text_config={**TEXT}, vision_config={**IMAGE}, projection_dim=16),
            "q_proj",
            "tiny, a CLIPModel, makes no features of texts alone: ",
        ),
        (t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2), "q", "encoder-decoder"),
    ],
)
def test_a_model_without_a_vector_for_each_token_is_refused(
    config: Any, targets: str, message: str, tmp_path: Path
) -> None:
    saved(config, tmp_path / "tiny")
    with pytest.raises(ModelError, match=message):
        load(Model(backbone="tiny", device="cpu", max_length=LENGTH), Adapter(targets=(targets,)), tmp_path)
