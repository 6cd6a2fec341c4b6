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
from celora.lazy import Lazy
from celora.models.backbone import Backbone
from celora.models.dual_backbone import DualBackbone
from celora.models.settings import Adapter

linalg = Lazy("scipy.linalg")
Start = Mapping[str, tuple[Tensor, Tensor]]
"""Adapted module -> A0 (r, d_in) and B0 (d_out, r)."""


def principal(backbone: Backbone | DualBackbone, adapter: Adapter) -> Start:
    """Where A and B of each adapted module start, float32 on the CPU.

    Server and sites compute it each for themselves: in float64, and with a sign for each pair of vectors, so that they
    agree to rounding wherever singular values are apart. The r vectors are eigenvectors of WᵀW or WWᵀ, whichever is
    smaller: a third of the time of all singular values, and digits to spare for float32.

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
    wide = weight.shape[0] < weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    count = len(gram)
    _, found = linalg.eigh(gram.numpy(), subset_by_index=[count - rank, count - 1])  # ascending
    vectors = torch.from_numpy(found).flip(1)
    vectors *= vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # the largest entry of each is positive
    other = weight.T @ vectors if wide else weight @ vectors  # S times the vectors of the other side
    values = other.norm(dim=0).clamp(min=torch.finfo(weight.dtype).tiny)
    one, two = (values / s).sqrt() * vectors, other / (values * s).sqrt()
    a, b = (two, one) if wide else (one, two)
    return a.T.float().contiguous(), b.float()
