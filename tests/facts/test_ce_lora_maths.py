"""Claims about CE-LoRA's server mathematics as assertions (methods.md 1.6 #3, part V 4 and 5)."""

import pytest
import torch
from torch import Tensor

from celora.maths.cka import cka
from celora.maths.distances import class_distances, distance_matrix, mixture_distance
from celora.maths.mixtures import Mixture, fit_mixture
from celora.maths.transport import plan
from celora.maths.weights import combine, kernel, row_weights


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


@pytest.mark.parametrize(("std", "expected"), [(0.01, 0.998), (0.05, 0.964), (0.1, 0.880), (0.3, 0.619)])
def test_cka_near_the_identity_is_saturated_for_unrelated_clients(std: float, expected: float) -> None:
    """Means over 180,000 pairs; methods.md has .999, .963, .882, .627 from fewer draws."""
    cores = torch.eye(8, dtype=torch.float64) + std * gaussian(600, 1, 8, 8)
    assert float(off_diagonal(cka(cores)).mean()) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("r", [8, 16, 64])
def test_linear_cka_of_independent_cores_is_a_half(r: int) -> None:
    assert float(off_diagonal(cka(gaussian(60, 1, r, r))).mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("r", [8, 16, 64])
def test_debiased_cka_of_independent_cores_is_zero_on_average(r: int) -> None:
    assert float(off_diagonal(cka(gaussian(60, 1, r, r), "debiased")).mean()) == pytest.approx(0, abs=0.02)


def test_without_the_identity_the_floor_is_a_half_again() -> None:
    """C − I removes the saturation, not the small-sample floor."""
    cores = torch.eye(8, dtype=torch.float64) + 0.05 * gaussian(100, 1, 8, 8)
    changes = off_diagonal(cka(cores - torch.eye(8, dtype=torch.float64)))
    assert float(changes.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(changes.std()) > 5 * float(off_diagonal(cka(cores)).std())


def test_cka_is_not_invariant_to_the_gauge_of_a() -> None:
    """B (C Q) (Qᵀ A) is the same function as B C A and scores less than 1; (B Qᵀ) (Q C) A scores 1."""
    core, q = gaussian(8, 8, seed=1), torch.linalg.qr(gaussian(8, 8, seed=2)).Q
    similarity = cka(torch.stack([core, q @ core, core @ q])[:, None])
    assert float(similarity[0, 1]) == pytest.approx(1, abs=1e-12)
    assert float(similarity[0, 2]) < 0.9


def client(shift: float, seed: int, rows: int = 40) -> Mixture:
    """Two classes of `rows` rows, moved by `shift` along one axis."""
    labels = torch.arange(2).repeat(rows)
    features = gaussian(2 * rows, 5, seed=seed) + 4 * labels[:, None] + shift * torch.eye(5)[0]
    return fit_mixture(features, labels, seed=seed)[0]


def test_mw2_of_a_mixture_with_itself_is_zero_and_it_is_symmetric() -> None:
    p, q = client(0.0, 0), client(2.0, 1)
    assert class_distances(p, p).diagonal().tolist() == [0.0, 0.0]
    torch.testing.assert_close(class_distances(p, q), class_distances(q, p).T)
    assert mixture_distance(p, p) == pytest.approx(0, abs=1e-9)
    assert mixture_distance(p, q) == pytest.approx(mixture_distance(q, p), rel=1e-9)


def test_transport_marginals_sum_to_one() -> None:
    p, q = client(0.0, 0), client(2.0, 1)
    moved = plan(p.masses, q.masses, torch.rand(len(p.masses), len(q.masses)))
    assert float(moved.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(moved.sum(1).float(), p.masses, atol=1e-6, rtol=0)
    torch.testing.assert_close(moved.sum(0).float(), q.masses, atol=1e-6, rtol=0)


def test_clients_of_one_domain_are_each_others_neighbours() -> None:
    """Two domains of three clients, far apart: S_data shows them; how sharply W does is a choice.

    A client's two neighbours get .4 of uniform weights, .47 of normalised sums, .8 of a softmax at .1.
    """
    distance = distance_matrix([client(shift, seed) for seed, shift in enumerate([0.0] * 3 + [6.0] * 3)])
    similarity = kernel(distance)
    assert similarity.diagonal().tolist() == [1.0] * 6
    assert float(similarity[:3, :3].min()) > 1.3 * float(similarity[:3, 3:].max())
    both = combine(similarity, torch.full((6, 6), 0.5))
    sums = row_weights(both, self_weight="excluded")[0, 1:3].sum()
    sharp = row_weights(both, normalise="softmax", temperature=0.1, self_weight="excluded")[0, 1:3].sum()
    assert float(sums) == pytest.approx(0.47, abs=0.02)
    assert float(sharp) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("normalise", ["sum", "softmax"])
@pytest.mark.parametrize(("self_weight", "own"), [("natural", None), ("excluded", 0.0), ("fixed", 0.35)])
def test_rows_of_w_sum_to_one_and_the_self_flag_is_honoured(normalise, self_weight, own) -> None:  # type: ignore[no-untyped-def]
    similarity = cka(gaussian(7, 2, 8, 8), "debiased")
    weights = row_weights(similarity, normalise=normalise, self_weight=self_weight, self_share=0.35)
    torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64))
    assert float(weights.min()) >= 0
    if own is not None:
        torch.testing.assert_close(weights.diagonal(), torch.full((7,), own, dtype=torch.float64))


def test_size_of_a_summary() -> None:
    """G (2 D + 1) floats and G class ids: 184,560 bytes at D = 768 and 10 classes of 3 components."""
    from celora.wire import contents

    count, dim = 30, 768
    mixture = Mixture(
        torch.zeros(count, dtype=torch.int32), torch.full((count,), 1 / count), *torch.ones(2, count, dim)
    )
    assert sum(size for _, size in contents(mixture)) == 4 * count * (2 * dim + 1) + 4 * count == 184_560
