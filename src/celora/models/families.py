"""Where every adapter starts: each matrix drawn by its own name, so that both sides agree on it for 0 bytes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from celora.core.adapters import Family, Part
from celora.core.task import HeadTensor
from celora.errors import ModelError
from celora.models.settings import Adapter
from celora.rng import generator


def initial(
    targets: Mapping[str, tuple[int, int]],
    adapter: Adapter,
    family: Family,
    head: Mapping[str, HeadTensor],
    seed: int,
    secret: int | None = None,
) -> dict[str, Tensor]:
    """Every weight at round 0, float32 on the CPU.

    Args:
        targets: adapted module -> (d_out, d_in).
        adapter: ranks of modules, `init` and `bases`.
        family: what stands at each adapted module.
        head: the task's.
        seed: the run's; both sides draw the same head, and the same bases where these are shared.
        secret: the seed known to one client alone, used for A (and an orthonormal B) when `bases = "secret"`.

    Returns:
        `<module>.<part>`, and the head's tensors.

    Raises:
        ModelError: if secret bases lack a secret, or orthonormal bases have no core or too high a rank.
    """
    if adapter.bases == "secret" and secret is None:
        raise ModelError('adapter.bases = "secret" needs the client\'s own secret seed; found none')
    bases = secret if adapter.bases == "secret" and secret is not None else seed
    weights: dict[str, Tensor] = {}
    for module, (d_out, d_in) in targets.items():
        parts = family.parts(adapter.rank_at(module), d_in, d_out)
        if adapter.init == "orthonormal" and not any(of.draw == "core" for of in parts.values()):
            raise ModelError(
                f'adapter.init = "orthonormal" starts from C = 0; family "{family.name}" has no C: use "kaiming"'
            )
        for letter, of in parts.items():
            weights[f"{module}.{letter}"] = drawn(of, adapter, bases, f"{module}.{letter}")
    return {**weights, **drawn_head(head, seed)}


def drawn_head(head: Mapping[str, HeadTensor], seed: int) -> dict[str, Tensor]:
    """The tensors of a task's head, as it declares them."""
    return {name: _uniform(of.bound, seed, name, of.shape) for name, of in head.items()}


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
