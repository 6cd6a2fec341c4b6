"""Gradient checkpointing: of each layer only what enters it is kept, and the rest is computed again going back.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.  https://arxiv.org/abs/1604.06174

The adapters of a pass are bound while it runs and unbound when backward begins, so a layer that is computed again is
bound again, in the mode and with the random numbers it first had. The numbers are the same to the last bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from celora.models.slots import Layers, Update, bound, replaced


class Checkpoints:
    """The layers that are computed again.

    Args:
        layers: path -> layer.
        adapted: the adapted modules, of all layers.
    """

    def __init__(self, layers: Mapping[str, nn.Module], adapted: Layers) -> None:
        self._layers = [
            (layer, {name: module for name, module in adapted.items() if name.startswith(f"{path}.")})
            for path, layer in layers.items()
        ]

    @contextmanager
    def __call__(self, updates: Mapping[str, Update], random: bool) -> Iterator[None]:
        """Within this context each layer keeps what enters it and nothing else, where a gradient is to be taken.

        Args:
            updates: those that are bound.
            random: whether something drops out.
        """
        with ExitStack() as stack:
            for layer, adapted in self._layers if torch.is_grad_enabled() else []:
                own = {name: updates[name] for name in adapted if name in updates}
                again = partial(_again, layer, adapted, own)
                stack.enter_context(replaced(layer, partial(_checkpointed, layer.forward, again, random)))
            yield


def _checkpointed(forward: Any, again: Any, random: bool, *args: Any, **kwargs: Any) -> Any:
    """What a layer returns; `again` gives the context in which it is computed once more."""
    contexts = (nullcontext(), again())
    return checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=random, context_fn=lambda: contexts, **kwargs
    )


def _again(layer: nn.Module, adapted: Layers, updates: Mapping[str, Update]) -> AbstractContextManager[None]:
    """A context in which the layer is as it is now."""
    modes = [(module, module.training) for module in layer.modules()]

    @contextmanager
    def restored() -> Iterator[None]:
        now = [(module, module.training) for module in layer.modules()]
        _set(modes)
        try:
            with bound(adapted, updates):
                yield
        finally:
            _set(now)

    return restored()


def _set(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
