"""Where every adapter starts: each matrix drawn by its own name, so that both sides agree on it for 0 bytes."""

import math

import torch
from torch import Tensor

from celora.core.adapters import Family, Part
from celora.errors import ModelError
from celora.models.backbone import Backbone
from celora.models.settings import Adapter
from celora.rng import generator


def initial(
    backbone: Backbone, adapter: Adapter, family: Family, classes: int, seed: int, secret: int | None = None
) -> dict[str, Tensor]:
    """Every weight at round 0, float32 on the CPU.

    Args:
        backbone: gives module names and shapes, and the width d of the head.
        adapter: rank, `init` and `bases`.
        family: what stands at each adapted module.
        classes: number of classes.
        seed: the run's; both sides draw the same head, and the same bases where these are shared.
        secret: the seed known to one client alone, used for A (and an orthonormal B) when `bases = "secret"`.

    Returns:
        `<module>.<part>`, and `head.weight (classes, d)`, `head.bias (classes,)` drawn as `torch.nn.Linear` does.

    Raises:
        ModelError: if secret bases lack a secret, or orthonormal bases have no core or too high a rank.
    """
    if adapter.bases == "secret" and secret is None:
        raise ModelError('adapter.bases = "secret" needs the client\'s own secret seed; found none')
    bases = secret if adapter.bases == "secret" and secret is not None else seed
    weights: dict[str, Tensor] = {}
    for module, (d_out, d_in) in backbone.targets.items():
        parts = family.parts(adapter.rank, d_in, d_out)
        if adapter.init == "orthonormal" and not any(of.draw == "core" for of in parts.values()):
            raise ModelError(
                f'adapter.init = "orthonormal" starts from C = 0; family "{family.name}" has no C: use "kaiming"'
            )
        for letter, of in parts.items():
            weights[f"{module}.{letter}"] = drawn(of, adapter, bases, f"{module}.{letter}")
    return {**weights, **head(classes, backbone.width, seed)}


def head(classes: int, width: int, seed: int) -> dict[str, Tensor]:
    """`head.weight (classes, width)` and `head.bias (classes,)`, drawn as `torch.nn.Linear` does."""
    bound = 1 / math.sqrt(width)
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (classes, width), "head.bias": (classes,)}
    return {name: _uniform(bound, seed, name, shape) for name, shape in shapes.items()}


def drawn(of: Part, adapter: Adapter, seed: int, name: str) -> Tensor:
    """The matrix of a part: A by `adapter.init` as PEFT's Kaiming or N(0, (1e-3)²) as in CE-LoRA's code."""
    shape, orthonormal = (of.rows, of.columns), adapter.init == "orthonormal"
    match of.draw:
        case "down" if adapter.init == "normal":
            return 1e-3 * torch.randn(shape, generator=generator(seed, "init", name))
        case "down" if not orthonormal:
            return _uniform(1 / math.sqrt(of.columns), seed, name, shape)  # kaiming_uniform_(a=√5)
        case "kaiming":
            return _uniform(1 / math.sqrt(of.columns), seed, name, shape)
        case "down" | "rows":
            return _orthonormal(seed, name, of.rows, of.columns)
        case "columns":
            return _orthonormal(seed, name, of.columns, of.rows).T.contiguous()
        case "up" if orthonormal:
            return _orthonormal(seed, name, of.columns, of.rows).T.contiguous()
        case "core" if not orthonormal:
            return torch.eye(of.rows)
        case "one":
            return torch.ones(shape)
        case _:
            return torch.zeros(shape)


def _orthonormal(seed: int, name: str, rank: int, width: int) -> Tensor:
    """(rank, width) with orthonormal rows, uniform among all such."""
    if rank > width:
        raise ModelError(f"{name}: {rank} orthonormal directions of {width} dimensions; expected a lower adapter.rank")
    q, r = torch.linalg.qr(torch.randn(width, rank, generator=generator(seed, "init", name)))
    rows: Tensor = (q * r.diagonal().sign()).T  # the signs make it Haar's distribution
    return rows.contiguous()


def _uniform(bound: float, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return (2 * torch.rand(shape, generator=generator(seed, "init", name)) - 1) * bound
