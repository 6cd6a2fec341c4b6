"""How alike two clients' cores are: linear centred kernel alignment (Kornblith et al., ICML 2019).

    X (n examples, features), columns centred, K = X Xᵀ:    CKA(X, Y) = ⟨K_X, K_Y⟩ / (‖K_X‖ ‖K_Y‖)

equal to ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), and invariant to an orthogonal map of features, not of examples.

**Orientation.** CE-LoRA (arXiv 2503.23869) multiplies row vectors, x A C B: the rows of its core, on the side
of A, are the examples. Ours is ΔW = s B C A, the transpose: X = Cᵀ, and the features are on the side of B, so

    CKA(C, Q C) = 1 for every orthogonal Q,    CKA(C, C Q) ≠ 1 in general.

**Read it with care.** r examples are few: two independent Gaussian cores score about .5, whatever r. And
C = I + E scores near 1 for unrelated small E: .998, .964, .880, .619 at entry deviations .01, .05, .1, .3 and
r = 8. So pass C − I, or use the debiased estimator, HSIC_1 (Song et al., JMLR 2012; in CKA: Nguyen, Raghu &
Kornblith, ICLR 2021), which is ⟨U_X, U_Y⟩ / (n(n − 3)) for the U-centred Gram matrices (Székely & Rizzo, Ann.
Statist. 2014). It is about 0 on average for independent cores, noisy at r = 8, and can be negative.
"""

from math import sqrt
from typing import Literal

from celora.lazy import Tensor, torch

Estimator = Literal["linear", "debiased"]
_CLIENTS = 512
"""Clients whose Gram matrices are made at a time; what is between lies in a cache and costs no memory."""


def cka(cores: Tensor, estimator: Estimator = "linear") -> Tensor:
    """CKA of every pair of clients, averaged over their layers; one product of normalised Gram matrices.

    A core without variance (zero, or all its columns equal; debiased: also a multiple of an orthogonal one,
    as C = I, whose examples are all equally far apart) has nothing to compare. It is alike (1) to another
    of its kind and unlike (0) any other: with C − I = 0 everywhere, all clients score 1 before training.

    Args:
        cores: (m, L, r, r), peft's orientation.
        estimator: "linear", in [0, 1], or "debiased", in [-1, 1].

    Returns:
        (m, m), float64, symmetric, 1 on the diagonal.

    Raises:
        ValueError: if the cores are of another shape or not finite, L is 0, or r < 4 with "debiased".
    """
    at = points(cores, estimator)
    similarity = at @ at.T
    return (similarity + similarity.T).div_(2).clamp_(-1, 1).fill_diagonal_(1.0)


def points(cores: Tensor, estimator: Estimator = "linear") -> Tensor:
    """A unit vector for each client, (m, L (r² + 1)) float64, whose inner products are `cka`; same errors."""
    if cores.dim() != 4 or cores.shape[2] != cores.shape[3] or not cores.shape[1:].numel():
        raise ValueError(f"cores have shape (clients, layers >= 1, r, r): found {tuple(cores.shape)}")
    if not cores.isfinite().all():
        bad = (~cores.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"cores must be finite: found NaN or infinity in those at positions {bad}")
    if estimator not in ("linear", "debiased"):
        raise ValueError(f"found estimator {estimator!r}, expected 'linear' or 'debiased'")
    if estimator == "debiased" and cores.shape[-1] < 4:
        raise ValueError(f"'debiased' needs rank 4 or more, found {cores.shape[-1]}: use 'linear'")

    return torch.cat([_points(some, estimator) for some in torch.split(cores, _CLIENTS)]) / sqrt(cores.shape[1])


def _points(cores: Tensor, estimator: Estimator) -> Tensor:
    examples = _unit(cores.double().mT, zero=0.0)
    examples = _unit(examples - examples.mean(dim=-2, keepdim=True))
    grams = examples @ examples.mT
    grams = _unit(_u_centred(grams) if estimator == "debiased" else grams).flatten(2)
    degenerate = (grams == 0).all(dim=-1, keepdim=True).double()
    return torch.cat([grams, degenerate], dim=-1).flatten(1)


def _unit(matrices: Tensor, zero: float = 1e-12) -> Tensor:
    """Each matrix over its Frobenius norm; 0 where the norm is at most `zero`, mere rounding of 1."""
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    return torch.where(norms > zero, matrices / norms, 0.0)


def _u_centred(grams: Tensor) -> Tensor:
    """K_ij − Σ_k K_ik/(n−2) − Σ_k K_kj/(n−2) + ΣΣK/((n−1)(n−2)) for i ≠ j, without K_ii in sums; else 0."""
    n = grams.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool)
    hollow = grams.masked_fill(diagonal, 0.0)
    rows, columns = hollow.sum(-1, keepdim=True), hollow.sum(-2, keepdim=True)
    total = rows.sum(-2, keepdim=True)
    return (hollow - (rows + columns) / (n - 2) + total / ((n - 1) * (n - 2))).masked_fill(diagonal, 0.0)
