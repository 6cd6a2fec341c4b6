"""Thin products against the dense matrices they are."""

import pytest
import torch
from torch import Tensor

from celora.maths.lowrank import Sum, norm, svd, truncated_svd

SHAPES = [(7, 5, 3), (5, 7, 3), (6, 6, 6), (4, 9, 12), (9, 4, 12), (3, 3, 1)]
"""k, d, R; also with R above one side, and above both."""


def pair(k: int, d: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(k, rank, generator=draw, dtype=torch.float64)
    return b, torch.randn(rank, d, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_svd_is_that_of_the_dense_matrix(shape: tuple[int, int, int]) -> None:
    b, a = pair(*shape)
    u, s, vt = svd(b, a)
    m = min(shape)
    assert (tuple(u.shape), tuple(s.shape), tuple(vt.shape)) == ((shape[0], m), (m,), (m, shape[1]))
    torch.testing.assert_close(s, torch.linalg.svdvals(b @ a)[:m])
    torch.testing.assert_close((u * s) @ vt, b @ a)
    for vectors in (u.mT @ u, vt @ vt.mT):
        torch.testing.assert_close(vectors, torch.eye(m, dtype=torch.float64))


def test_the_largest_entry_of_each_right_vector_is_positive() -> None:
    b, a = pair(7, 5, 4)
    for signs in ((1, 1), (-1, 1), (-1, -1)):
        u, _, vt = svd(signs[0] * b, signs[1] * a)
        assert (vt.gather(1, vt.abs().argmax(dim=1, keepdim=True)) > 0).all()
        torch.testing.assert_close(u * signs[0] * signs[1], svd(b, a)[0])


def test_a_product_of_zero_has_a_right_basis_all_the_same() -> None:
    u, s, vt = svd(torch.zeros(5, 2), torch.zeros(2, 4))
    assert not s.any()
    torch.testing.assert_close(vt @ vt.mT, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(u.mT @ u, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_of_that_rank_is_nearer(shape: tuple[int, int, int]) -> None:
    """The distance is that of the discarded singular values, and 200 other pairs of that rank are further away."""
    b, a = pair(*shape)
    dense, values = b @ a, torch.linalg.svdvals(b @ a)
    for rank in range(1, min(shape) + 1):
        found = torch.matmul(*truncated_svd(b, a, rank))
        distance = (found - dense).norm()
        torch.testing.assert_close(distance, values[rank:].norm(), atol=1e-12, rtol=1e-9)
        for seed in range(200):
            left, right = pair(shape[0], shape[1], rank, seed)
            near, far = found + 1e-2 * left @ right, torch.linalg.lstsq(right.mT, dense.mT).solution.mT @ right
            if torch.linalg.matrix_rank(near) <= rank:
                assert (near - dense).norm() >= distance - 1e-12
            assert (far - dense).norm() >= distance - 1e-12


def test_lower_ranks_are_the_first_rows_and_columns() -> None:
    b, a = pair(7, 5, 4)
    full, low = truncated_svd(b, a, 4), truncated_svd(b, a, 2)
    assert torch.equal(full[0][:, :2], low[0])
    assert torch.equal(full[1][:2], low[1])


def test_a_rank_above_the_products_gives_the_products_and_the_dtype_it_was_given() -> None:
    b, a = (w.float() for w in pair(7, 5, 2))
    left, right = truncated_svd(b, a, 4)
    assert (tuple(left.shape), tuple(right.shape)) == ((7, 2), (2, 5))
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left @ right, b @ a)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_that_of_the_dense_matrix(shape: tuple[int, int, int]) -> None:
    b, a = pair(*shape)
    assert norm(b, a) == pytest.approx(float((b @ a).norm()), rel=1e-12)
    assert norm(0 * b, a) == 0


@pytest.mark.parametrize("terms", [1, 2, 40])
def test_a_sum_is_the_sum_and_stays_narrow(terms: int) -> None:
    total, exact = Sum(), torch.zeros(6, 5, dtype=torch.float64)
    for seed in range(terms):
        b, a = pair(6, 5, 1 + seed % 3, seed)
        total.add(b, a, seed + 0.5)
        exact += (seed + 0.5) * b @ a
        assert total.factors()[0].shape[1] <= 2 * 5
    torch.testing.assert_close(torch.matmul(*total.factors()), exact)
