"""Products B A of thin factors, B (k, R) and A (R, d), without making the matrix (k, d) that they are.

    svd        B A = U S Vᵀ:  B = Q_B R_B and Aᵀ = Q_A R_A by QR, and an SVD of the core R_B R_Aᵀ between them
    nearest    the nearest product of rank r, by Eckart & Young (Psychometrika 1936): U_r S_r times V_rᵀ
    norm       ‖B A‖_F = sqrt tr(BᵀB · A Aᵀ), from two R × R Gram matrices
    Sum        Σ w_i B_i A_i, term by term, as one pair of factors: [B_1 B_2 …] times [w_1 A_1; w_2 A_2; …]

The core is (min(k, R), min(d, R)): as large as the matrix only where R is as large as both its sides. All is computed
in float64 and given in float64, but for `truncated_svd`, which gives what it was given.
"""

from celora.lazy import Tensor, torch


def svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of B A.

    Args:
        b: (k, R).
        a: (R, d).

    Returns:
        U (k, m), S (m,), from large to small, and Vᵀ (m, d), m = min(k, d, R); float64. The sign of each pair of
        vectors is such that the largest entry of v is positive, so that it does not depend on the machine.

    >>> u, s, vt = svd(torch.tensor([[0.0], [3.0]]), torch.tensor([[2.0, 0.0]]))
    >>> u.tolist(), s.tolist(), vt.tolist()
    ([[0.0], [1.0]], [6.0], [[1.0, 0.0]])
    """
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    u, vt = left @ u, vt @ right.mT
    sign = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)).sign()
    return u * sign.mT + 0.0, s, vt * sign + 0.0  # no -0.0


def truncated_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (k, r) = U_r S_r and A (r, d) = V_rᵀ, r = min(rank, k, d, R): of all pairs of that rank the one whose product
    is nearest to B A, at a distance (Frobenius) of sqrt Σ_{j > r} S_j². Pairs of lower rank are their first columns and
    rows.
    """
    u, s, vt = svd(b, a)
    return (u * s)[:, :rank].to(b.dtype), vt[:rank].to(a.dtype)


def norm(b: Tensor, a: Tensor) -> float:
    """‖B A‖_F."""
    b, a = b.double(), a.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt())


class Sum:
    """Σ w_i B_i A_i as factors, one term at a time.

    However many terms there are, no more than 2 · min(k, d) columns and the last term are held: beyond, the sum is
    written with min(k, d) columns, which loses nothing but rounding.
    """

    def __init__(self) -> None:
        self._b: list[Tensor] = []
        self._a: list[Tensor] = []

    def add(self, b: Tensor, a: Tensor, weight: float = 1.0) -> None:
        """Add weight · B A, B (k, r) and A (r, d); r may be another one for each term."""
        self._b.append(b.double())
        self._a.append(weight * a.double())
        full = min(len(b), a.shape[1])
        if sum(map(len, self._a)) > 2 * full:
            b, a = truncated_svd(*self.factors(), full)
            self._b, self._a = [b], [a]

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (k, R) and A (R, d), float64, whose product is the sum."""
        return torch.cat(self._b, dim=1), torch.cat(self._a)
