"""A classifier before real networks, of rows that are given as tensors: for tests of models and solvers."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from celora.core.adapters import Family
from celora.core.task import Examples
from celora.models import families
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone
from celora.models.batching import BatchedForward
from celora.models.batching import predict as outputs_of
from celora.models.inputs import Inputs
from celora.models.rows import Rows
from celora.models.settings import Adapter
from celora.models.shared_backbone import AdaptedBackbone
from celora.tasks.classify import Classify
from celora.tensors import Tensors


def task(classes: int = 2) -> Classify:
    """A classifier of classes "0", "1", …"""
    return Classify(classes=tuple(str(number) for number in range(classes)))


def rows(inputs: Any, labels: Tensor, first: int = 0) -> Rows:
    """Rows `first`, `first` + 1, … of a data set of which nothing else is ever read."""
    if isinstance(inputs, Inputs):
        assert first == 0
        whole: Any = inputs
    elif isinstance(inputs, Tensor):
        whole = torch.cat([inputs.new_zeros(first, *inputs.shape[1:]), inputs])
    else:
        whole = [[0]] * first + list(inputs)

    def targets(at: Sequence[int]) -> Tensors:
        return {"labels": labels[torch.as_tensor(at, dtype=torch.int64) - first]}

    return Rows(Examples(whole, targets), range(first, first + len(labels)))


def parts(whole: Rows, sizes: Sequence[int]) -> list[Rows]:
    """The rows of a data set, dealt to clients of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [Rows(whole.examples, whole.at[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def forward(
    backbone: Backbone, family: Family, activations: ActivationCache | None = None, classes: int = 2
) -> BatchedForward:
    return BatchedForward(AdaptedBackbone(backbone, family, activations), task(classes))


def initial(
    backbone: Backbone, adapter: Adapter, family: Family, classes: int, seed: int, secret: int | None = None
) -> dict[str, Tensor]:
    """Adapters and the head of a classifier."""
    head = task(classes).head(backbone.width)
    return families.initial(backbone.targets, adapter, family, head, seed, secret)


def predict(backbone: Backbone, family: Family, weights: Tensors, inputs: Any) -> Tensor:
    """Logits (n, classes)."""
    classes = len(weights["head.bias"])
    network, given = AdaptedBackbone(backbone, family), rows(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    return outputs_of(network, task(classes), weights, given)
