"""What drops out while training: a network is in training mode for one pass, and draws from a seed of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(transformer: nn.Module, seed: int | None, dropout: bool, device: torch.device) -> Iterator[None]:
    """Within this context what drops out draws from the seed; without one, nothing does.

    It needs the global generator, which is put back afterwards.

    Args:
        dropout: whether the network's own dropout is on.
        device: where it runs.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        transformer.train(dropout)
        keep_statistics(transformer)
        try:
            yield
        finally:
            transformer.eval()


def keep_statistics(transformer: nn.Module) -> None:
    """Let no batch norm use or change statistics of a batch, whatever mode the transformer is in: they are frozen."""
    for module in transformer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
