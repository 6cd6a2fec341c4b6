"""Gradient checkpointing: of each layer only what enters it is kept, and the rest is computed again going back.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.  https://arxiv.org/abs/1604.06174

The adapters of a pass are bound while it runs and unbound when backward begins, so a layer that is computed again is
bound again, in the mode and with the random numbers it first had. The numbers are the same to the last bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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
                again = partial(_Again, layer, adapted, own)
                stack.enter_context(replaced(layer, partial(_checkpointed, layer.forward, again, random)))
            yield


def _checkpointed(forward: Any, again: Callable[[], "_Again"], random: bool, *args: Any, **kwargs: Any) -> Any:
    """What a layer returns."""
    contexts = (nullcontext(), again())
    return checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=random, context_fn=lambda: contexts, **kwargs
    )


class _Again:
    """The context in which a layer is as it is now; entered as often as it is computed, for second derivatives twice.

    Args:
        adapted: the adapted modules in it.
        updates: what is bound to them.
    """

    def __init__(self, layer: nn.Module, adapted: Layers, updates: Mapping[str, Update]) -> None:
        self._layer, self._adapted, self._updates = layer, adapted, updates
        self._modes, self._entered = _modes(layer), ExitStack()

    def __enter__(self) -> None:
        self._entered.callback(_set, _modes(self._layer))
        _set(self._modes)
        self._entered.enter_context(bound(self._adapted, self._updates))

    def __exit__(self, *_: object) -> None:
        self._entered.close()


def _modes(layer: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in layer.modules()]


def _set(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
