"""Adapter families: what is trained at each adapted module, as a differentiable map onto LoRA's two factors.

    lora: ΔW = s · B A       A (r, d_in), B (d_out, r)
    tri:  ΔW = s · B C A     C (r, r) (CE-LoRA; TriLoRA, Fed-SB and LoRA-XS have the same shape)

Every initialisation makes ΔW = 0, so all clients start from the frozen backbone.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from celora.errors import ModelError
from celora.models.backbone import Adapter, Backbone
from celora.rng import generator
from celora.tensors import Tensors, part

Family = Literal["lora", "tri"]


def initial(
    backbone: Backbone, adapter: Adapter, family: Family, classes: int, seed: int, secret: int | None = None
) -> dict[str, Tensor]:
    """Every weight at round 0, float32 on the CPU, each drawn by its own name.

    Args:
        backbone: gives module names and shapes, and the width d of the head.
        adapter: rank, `init` and `bases`.
        family: "lora" or "tri".
        classes: number of classes.
        seed: the run's; both sides draw the same head, and the same bases where these are shared.
        secret: the seed known to one client alone, used for A (and an orthonormal B) when `bases = "secret"`.

    Returns:
        `<module>.A (r, d_in)`, `<module>.B (d_out, r)`, for tri `<module>.C (r, r)`, and `head.weight
        (classes, d)`, `head.bias (classes,)` drawn as `torch.nn.Linear` does.

    Raises:
        ModelError: if secret bases lack a secret, or orthonormal bases have no core or too high a rank.
    """
    if adapter.bases == "secret" and secret is None:
        raise ModelError('adapter.bases = "secret" needs the client\'s own secret seed; found none')
    if adapter.init == "orthonormal" and family == "lora":
        raise ModelError('adapter.init = "orthonormal" starts from C = 0; family "lora" has no C: use "kaiming"')
    bases = secret if adapter.bases == "secret" and secret is not None else seed
    weights: dict[str, Tensor] = {}
    for module, (d_out, d_in) in backbone.targets.items():
        rank = adapter.rank
        weights[f"{module}.A"] = _base(adapter, bases, f"{module}.A", (rank, d_in))
        if adapter.init == "orthonormal":
            weights[f"{module}.B"] = _base(adapter, bases, f"{module}.B", (rank, d_out)).T.contiguous()
            weights[f"{module}.C"] = torch.zeros(rank, rank)
        else:
            weights[f"{module}.B"] = torch.zeros(d_out, rank)
            if family == "tri":
                weights[f"{module}.C"] = torch.eye(rank)
    bound = 1 / math.sqrt(backbone.width)
    weights["head.weight"] = _uniform(bound, seed, "head.weight", (classes, backbone.width))
    weights["head.bias"] = _uniform(bound, seed, "head.bias", (classes,))
    return weights


def _base(adapter: Adapter, seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """A matrix (r, d): Kaiming as PEFT's LoRA, N(0, (1e-3)²) as CE-LoRA's code, or orthonormal rows."""
    rank, width = shape
    match adapter.init:
        case "kaiming":
            return _uniform(1 / math.sqrt(width), seed, name, shape)  # kaiming_uniform_(a=√5)
        case "normal":
            return 1e-3 * torch.randn(shape, generator=generator(seed, "init", name))
        case _:
            if rank > width:
                raise ModelError(f"adapter.rank = {rank}: orthonormal bases of {name} allow at most {width}")
            q, r = torch.linalg.qr(torch.randn(width, rank, generator=generator(seed, "init", name)))
            rows: Tensor = (q * r.diagonal().sign()).T  # the signs make it Haar's distribution
            return rows.contiguous()


def _uniform(bound: float, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return (2 * torch.rand(shape, generator=generator(seed, "init", name)) - 1) * bound


def factors(weights: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's two factors at every adapted module: (A, B), or (A, B C) where there is a core.

    Args:
        weights: A (r, d_in), B (d_out, r), C (r, r), each with or without a leading client axis K.

    Returns:
        module -> (A (r, d_in), (d_out, r)), a leading K where any of its inputs has one; differentiable.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, a in weights.items():
        if part(name) == "A":
            module = name.removesuffix(".A")
            b, c = weights[f"{module}.B"], weights.get(f"{module}.C")
            found[module] = (a, b if c is None else b @ c)
    return found
