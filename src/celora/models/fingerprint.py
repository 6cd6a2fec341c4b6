"""What tells one frozen backbone from another: SHA-256 of its files, or of weights that lie in none.

    files:<hex>    config.json but for how it was saved, and every tensor by name, dtype, shape and bytes
    <hex>          names, dtypes, shapes and values of weights in memory: backbones that are drawn or put together

Tensors are taken by name whatever file they lie in, one at a time. So a model has one fingerprint however it is cut
into shards, and none of it need be in memory. Files of another kind than safetensors are taken byte by byte.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from celora.errors import ModelError

MARK = "files:"
"""Fingerprints of files begin so; those that celora made before it hashed files do not."""
_SAVED = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})
"""What a configuration says of how the model was saved, and not of the model."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers looks for them, each of them whole or as an index of shards."""


def of_files(folder: Path, read_as: str) -> str:
    """The fingerprint of a model that `save_pretrained` wrote.

    Args:
        read_as: what becomes of its weights when they are loaded, such as "bfloat16".

    Raises:
        ModelError: if it holds no weights, or they cannot be read.
    """
    digest = hashlib.sha256(f"{read_as}\n".encode())
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        known = {key: value for key, value in config.items() if key not in _SAVED}
        digest.update(json.dumps(known, sort_keys=True).encode())
        paths = _weights(folder)
        if paths[0].suffix == ".safetensors":
            _tensors(paths, digest.update)
        else:
            for path in paths:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be read for its fingerprint: {error}") from error
    return MARK + digest.hexdigest()


def of_weights(weights: Mapping[str, Tensor]) -> str:
    """The fingerprint of weights in memory, by name; an adapted module's are its own."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        _add(digest.update, name.replace(".base_layer", ""), tensor)
    return digest.hexdigest()


def _weights(folder: Path) -> Sequence[Path]:
    """The files that transformers loads."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards: Mapping[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise FileNotFoundError(f"found none of {', '.join(_WEIGHTS)}")


def _tensors(paths: Sequence[Path], update: Callable[[bytes | memoryview], None]) -> None:
    """Every tensor of all files, by name."""
    files: list[Any] = [safe_open(path, framework="pt") for path in paths]
    named = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no mapping
    for name in sorted(named):
        _add(update, name, named[name].get_tensor(name))


def _add(update: Callable[[bytes | memoryview], None], name: str, tensor: Tensor) -> None:
    update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
