"""How a row's token vectors become one vector."""

import torch
from torch import Tensor

from celora.models.settings import Pooling


def pooled(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(rows, t, d) -> (rows, d); padding takes no part.

    Args:
        mask: (rows, t), 1 where there is a token; None: everywhere.
    """
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    match pooling:
        case "cls":
            return hidden[:, 0]
        case "mean":
            weights = mask.to(hidden.dtype)
            return (weights.unsqueeze(1) @ hidden).squeeze(1) / weights.sum(1, keepdim=True)
        case _:
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
