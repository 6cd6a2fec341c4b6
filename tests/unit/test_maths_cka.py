"""celora.maths.cka: orientation, both estimators against their definitions, degenerate cores."""

import pytest
import torch
from torch import Tensor

from celora.maths.cka import cka


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(r, r, seed=seed)).Q


def pair(one: Tensor, two: Tensor, estimator: str = "linear") -> float:
    return float(cka(torch.stack([one, two])[:, None], estimator)[0, 1])  # type: ignore[arg-type]


def linear(one: Tensor, two: Tensor) -> float:
    """The definition on features: X = Cᵀ, columns centred."""
    x, y = (c.T - c.T.mean(0) for c in (one, two))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def hsic1(one: Tensor, two: Tensor) -> Tensor:
    """Song et al. 2012, equation 5, on Gram matrices of uncentred examples."""
    k, other = ((c.T @ c).fill_diagonal_(0) for c in (one, two))
    n, ones = len(k), torch.ones(len(k), dtype=k.dtype)
    middle = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    return (torch.trace(k @ other) + middle - 2 / (n - 2) * (ones @ k @ other @ ones)) / (n * (n - 3))


@pytest.mark.parametrize("r", [2, 4, 8])
def test_linear_is_its_definition(r: int) -> None:
    one, two = gaussian(r, r, seed=1), gaussian(r, r, seed=2)
    assert pair(one, two) == pytest.approx(linear(one, two), rel=1e-12)


@pytest.mark.parametrize("r", [4, 5, 8, 16])
def test_debiased_is_its_definition(r: int) -> None:
    one, two = gaussian(r, r, seed=1), gaussian(r, r, seed=2)
    expected = float(hsic1(one, two) / (hsic1(one, one) * hsic1(two, two)).sqrt())
    assert pair(one, two, "debiased") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("estimator", ["linear", "debiased"])
def test_orientation_features_are_on_the_side_of_b(estimator: str) -> None:
    core, q = gaussian(8, 8, seed=3), orthogonal(8, seed=4)
    assert pair(core, q @ core, estimator) == pytest.approx(1, abs=1e-12)
    assert pair(core, 5 * core, estimator) == pytest.approx(1, abs=1e-12)
    assert pair(core, core + gaussian(8, 1, seed=5), estimator) == pytest.approx(1, abs=1e-12)  # a shift of features
    assert abs(pair(core, core @ q, estimator)) < 0.95


def test_layers_are_averaged() -> None:
    cores = gaussian(3, 5, 4, 4)
    expected = torch.stack([cka(cores[:, [layer]]) for layer in range(5)]).mean(0)
    torch.testing.assert_close(cka(cores), expected)


@pytest.mark.parametrize("estimator", ["linear", "debiased"])
def test_symmetric_one_on_the_diagonal_and_bounded(estimator: str) -> None:
    similarity = cka(gaussian(9, 2, 6, 6).float(), estimator)  # type: ignore[arg-type]
    assert similarity.dtype == torch.float64
    assert torch.equal(similarity, similarity.T)
    assert similarity.diagonal().tolist() == [1.0] * 9
    assert float(similarity.abs().max()) <= 1
    assert float(similarity.min()) >= (0 if estimator == "linear" else -1)


def test_debiased_can_be_negative() -> None:
    assert float(cka(gaussian(12, 1, 8, 8), "debiased").min()) < 0


@pytest.mark.parametrize("estimator", ["linear", "debiased"])
def test_follows_a_permutation_of_the_clients(estimator: str) -> None:
    cores, order = gaussian(5, 3, 4, 4), [4, 0, 3, 1, 2]
    torch.testing.assert_close(cka(cores[order], estimator), cka(cores, estimator)[order][:, order])  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["linear", "debiased"])
@pytest.mark.parametrize("nothing", [torch.zeros(6, 6), torch.full((6, 6), 0.1), gaussian(6, 1).expand(6, 6)])
def test_a_core_without_variance_is_alike_only_to_its_kind(estimator: str, nothing: Tensor) -> None:
    cores = torch.stack([torch.zeros(6, 6), gaussian(6, 6), nothing.double()])[:, None]
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(cka(cores, estimator), expected)  # type: ignore[arg-type]


def test_before_training_all_are_alike() -> None:
    identity = torch.eye(8).expand(4, 3, 8, 8)
    for start in (identity, identity - torch.eye(8)):
        torch.testing.assert_close(cka(start), torch.ones(4, 4, dtype=torch.float64))
        torch.testing.assert_close(cka(start, "debiased"), torch.ones(4, 4, dtype=torch.float64))


def test_a_degenerate_layer_counts_in_the_mean() -> None:
    cores = torch.stack([torch.zeros(2, 4, 4, dtype=torch.float64), gaussian(2, 4, 4)], dim=1)
    torch.testing.assert_close(cka(cores)[0, 1], (1 + cka(cores[:, 1:])[0, 1]) / 2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    cores = gaussian(3, 2, 5, 5).float()
    torch.testing.assert_close(cka(cores * scale, "debiased"), cka(cores, "debiased"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_nobody_and_one(count: int) -> None:
    assert cka(torch.zeros(count, 1, 4, 4)).tolist() == [[1.0]] * count


@pytest.mark.parametrize(
    ("cores", "estimator", "message"),
    [
        (torch.zeros(2, 4, 4), "linear", "shape"),
        (torch.zeros(2, 1, 4, 3), "linear", "shape"),
        (torch.zeros(2, 0, 4, 4), "linear", "layers"),
        (torch.zeros(2, 1, 3, 3), "debiased", "rank 4 or more, found 3"),
        (torch.tensor([1.0, torch.nan]).reshape(2, 1, 1, 1), "linear", r"positions \[1\]"),
        (torch.zeros(2, 1, 4, 4), "cosine", "found estimator 'cosine'"),
    ],
)
def test_wrong_arguments(cores: Tensor, estimator: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cka(cores, estimator)  # type: ignore[arg-type]


def test_arguments_stay_as_they_were() -> None:
    cores = gaussian(3, 2, 4, 4)
    before = cores.clone()
    cka(cores, "debiased")
    assert torch.equal(cores, before)
