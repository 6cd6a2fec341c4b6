"""GGUF files: a model of any kind that transformers reads out of them, converted once into a folder of its own.

Numbers of 2 to 8 bits become floating-point numbers, exactly so in float32, rounded in bfloat16. What is loaded is the
folder, which is like any other: it can be adapted at every linear module, exported from, and loaded without gguf.
"""

import hashlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from celora.cache import cache_folder
from celora.errors import ModelError
from celora.lazy import Lazy

if TYPE_CHECKING:
    import transformers
else:
    transformers = Lazy("transformers")

SUFFIX = ".gguf"
INSTALL = "pip install --no-deps gguf==0.19.0"
"""What gguf reads files with (numpy, PyYAML, tqdm) comes with celora."""


def from_gguf(file: Path, dtype: torch.dtype) -> Path:
    """The folder of the model in a GGUF file.

    Raises:
        ModelError: if there is no such file, the package gguf is missing, the file cannot be read, or the cache cannot
            be written.
    """
    if not file.is_file():
        raise ModelError(f'model.backbone = "{file}": there is no such GGUF file ({file.resolve()})')
    if find_spec("gguf") is None:
        raise ModelError(f"{file} needs the package gguf, which reads its weights and is not installed: {INSTALL}")
    kept = f"{file.stem}-{str(dtype).removeprefix('torch.')}"
    return converted(file, kept, f'model.backbone = "{file}"', dtype, "choose another file")


def converted(file: Path, kept: str, setting: str, dtype: torch.dtype, remedy: str) -> Path:
    """The folder of the model and its tokenizer, as `save_pretrained` writes them, in celora's cache.

    The first call converts; other processes wait for it. The folder is named by the SHA-256 of the file and gets its
    name when it is whole and on the disk.

    Args:
        kept: what the folder's name begins with.
        setting: what asked for it, for messages.
        dtype: of the weights in the folder.
        remedy: what to do where the file cannot be read.

    Raises:
        ModelError: if the file cannot be read, or the cache cannot be written.
    """
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = cache_folder() / f"{kept}-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                _write(*_read(file, dtype, remedy), folder)
    except (OSError, SafetensorError) as error:
        room = file.stat().st_size * dtype.itemsize * 2  # numbers of 4 bits become numbers of 16 or 32
        raise ModelError(
            f"{setting} is converted once, into {folder}, which cannot be written: {error}. "
            f"Free {room / 1e6:.0f} MB there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _read(file: Path, dtype: torch.dtype, remedy: str) -> tuple[Any, Any]:
    """The model, dequantised, and its tokenizer."""
    of = {"gguf_file": file.name, "local_files_only": True}
    exact = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **of)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, quantization_config=exact, **of
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{file} cannot be converted: {error}; {remedy}") from error
    return model, tokenizer


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Under another name first, where a process that was killed may have left its half."""
    new = folder.parent / f"{folder.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for path in (*new.iterdir(), new):
            _flush(path)
        new.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
