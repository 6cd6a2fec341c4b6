"""PiSSA: adapters that start from the largest singular values of the frozen weights.

    Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    NeurIPS 2024. https://arxiv.org/abs/2404.02948

    W = U S Vᵀ        B0 = U_r √(S_r / s),   A0 = √(S_r / s) V_rᵀ        y = (W − s·B0 A0) x + s·B A x

The residual W − s·B0 A0 is everybody's. It is never made: an adapter adds s·(B A − B0 A0) x to W x, so that the
backbone stays one for all algorithms of a comparison, and an export is an adapter of W, of rank 2 r: [B | −B0] [A; A0].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from celora.errors import ModelError
from celora.models.backbone import Backbone
from celora.models.settings import Adapter

Start = Mapping[str, tuple[Tensor, Tensor]]
"""Adapted module -> A0 (r, d_in) and B0 (d_out, r)."""


def principal(backbone: Backbone, adapter: Adapter) -> Start:
    """Where A and B of each adapted module start, float32 on the CPU.

    Server and sites compute it each for themselves: in float64, and with a sign for each pair of vectors, so that they
    agree to rounding wherever singular values are apart.

    Raises:
        ModelError: if a module has fewer singular values than the rank.
    """
    return {
        module: _pair(backbone.weight(module), adapter.rank_at(module), backbone.scalings[module], module)
        for module in backbone.targets
    }


def _pair(weight: Tensor, rank: int, s: float, module: str) -> tuple[Tensor, Tensor]:
    if rank > min(weight.shape):
        raise ModelError(
            f'adapter.init = "pissa": {module} has {min(weight.shape)} singular values; found rank {rank}, expected no '
            "more than that"
        )
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    u, roots, vh = u[:, :rank], (values[:rank] / s).sqrt(), vh[:rank]
    signs = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()  # the largest entry of each row of A0 is positive
    return (roots[:, None] * signs * vh).float(), (u * signs.T * roots).float()
