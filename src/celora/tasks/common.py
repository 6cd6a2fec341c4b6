"""What several tasks do alike: a linear head, its logits, sums for each client, and the order of metrics.

logits = h Wᵀ + b        h (d,) a representation, W (n, d), b (n,), or none where transformers' class has none
"""

import math
from collections.abc import Mapping, Sequence

from celora.core.adapters import linear
from celora.core.metrics import Metric
from celora.core.task import HeadTensor
from celora.lazy import Tensor
from celora.tensors import Tensors


def head(outputs: int, width: int) -> dict[str, HeadTensor]:
    """`head.weight (outputs, width)` and `head.bias (outputs,)`, drawn as `torch.nn.Linear` does."""
    bound = 1 / math.sqrt(width)
    return {"head.weight": HeadTensor((outputs, width), bound), "head.bias": HeadTensor((outputs,), bound)}


def logits(states: Tensor, weights: Tensors) -> Tensor:
    """(rows, ..., outputs) of representations (rows, ..., d), under one head or one for each client."""
    return linear(states, weights["head.weight"], weights.get("head.bias"))


def summed(each: Tensor, counts: Tensor, clients: int | None) -> tuple[Tensor, Tensor]:
    """Sums of losses and of what counts, client-major: each `()`, or `(clients,)`."""
    if clients is None:
        return each.sum(), counts.sum()
    return each.view(clients, -1).sum(1), counts.view(clients, -1).sum(1)


def ranked(metrics: Mapping[str, Metric], score: str) -> Sequence[Metric]:
    """The metric that `score` names, and the others."""
    return [metrics[score], *(metric for name, metric in metrics.items() if name != score)]
