"""What adapted modules read, seen from outside: tried on a row or two, and summed up over batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from celora.errors import ModelError
from celora.models import loading
from celora.models.feature_maps import as_tokens
from celora.models.slots import Layers, watched


@torch.no_grad()
def tried(
    transformer: Any,
    layers: Layers,
    rows: Callable[[], Mapping[str, Tensor]],
    *,
    kind: Literal["text", "image"],
    name: str,
    device: torch.device,
) -> tuple[Tensor, dict[str, list[int]]]:
    """Last hidden states of a few rows; and adapted module -> the length of what it reads in each call.

    Args:
        rows: makes what the transformer accepts.
        kind: of rows.
        name: the backbone's, for messages.
        device: where hidden states are to be.

    Raises:
        ModelError: if it makes no vector for each token.
    """
    lengths, what = dict[str, list[int]](), f"{name}, a {type(transformer).__name__},"
    try:
        accepted = rows()
        with loading.quiet(), watched(layers, lambda name, x: lengths.setdefault(name, []).append(len(x))):
            states: Tensor = transformer(**accepted).last_hidden_state.to(device)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{what} makes no features of {kind}s alone: {loading.reason(error)}") from error
    found, count = states if kind == "text" else as_tokens(states), len(next(iter(accepted.values())))
    tokens = accepted["input_ids"].shape[1:] if kind == "text" else found.shape[1:-1]
    if found.dim() != 3 or found.shape[:-1] != (count, *tokens):
        raise ModelError(
            f"{what} gives a tensor {tuple(states.shape)} for {count} {kind}; expected (rows, tokens, width): "
            "choose a transformer that keeps its tokens apart, such as BERT, Llama, ViT or Swin"
        )
    return states, lengths


@torch.no_grad()
def squares(
    transformer: Any,
    layers: Layers,
    accepted: Mapping[str, Tensor],
    of_rows: Mapping[str, Sequence[bool]],
    name: str,
) -> dict[str, Tensor]:
    """Adapted module -> the sum over all tokens of its squared inputs (d_in,), float64 on the CPU; padding aside.

    Args:
        of_rows: module -> whether each of its calls has rows on the first axis of what it reads.
        name: the backbone's, for messages.

    Raises:
        ModelError: if no call of some module has.
    """
    if absent := [module for module, calls in of_rows.items() if not any(calls)]:
        raise ModelError(
            f"{absent[0]} of {name} reads no tensor (rows, tokens, width), so its tokens cannot be told from "
            "padding: choose other adapter.targets, or an algorithm that needs no input norms"
        )
    found, mask = dict[str, Tensor](), accepted.get("attention_mask")
    left = {module: iter(calls) for module, calls in of_rows.items()}

    def look(module: str, x: Tensor) -> None:
        if module in left and next(left[module], False):
            x = x.double().square()
            x = x if mask is None else x.reshape(*mask.shape, -1) * mask.unsqueeze(-1).to(x.device)
            found[module] = x.flatten(0, -2).sum(0).cpu() + found.get(module, 0)

    with watched(layers, look):
        transformer(**accepted)
    return found
