"""celora.maths.mixtures: what a client tells, and what it withholds."""

import warnings
from typing import Any

import pytest
import sklearn.mixture
import torch
from torch import Tensor

from celora.errors import WireError
from celora.maths.mixtures import Mixture, fit_mixture
from celora.wire import contents, pack, unpack


def blobs(counts: dict[int, int], dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of each class around its own point."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in counts.items()])
    return torch.randn(len(labels), dim, generator=draw) + 3.0 * labels[:, None], labels


def held(mixture: Mixture, features: Tensor, labels: Tensor) -> list[int]:
    """How many rows each reported component is the likeliest of, among those of its class."""
    counts = []
    for label in mixture.labels.unique():
        own = mixture.labels == label
        rows = features[labels == label].double()[:, None]
        mean, spread = mixture.means[own].double(), mixture.spreads[own].double()
        score = mixture.masses[own].double().log() - spread.log().sum(1)
        score = score - ((rows - mean) / spread).square().sum(2) / 2
        counts += score.argmax(1).bincount(minlength=int(own.sum())).tolist()
    return counts


def test_one_component_is_mean_and_spread() -> None:
    features, labels = blobs({2: 40, 5: 60})
    mixture, withheld = fit_mixture(features, labels, components=1, seed=0)
    assert mixture.labels.tolist() == [2, 5]
    assert withheld == {}
    for g, label in enumerate((2, 5)):
        rows = features[labels == label]
        torch.testing.assert_close(mixture.means[g], rows.mean(0))
        torch.testing.assert_close(mixture.spreads[g], (rows.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(mixture.masses, torch.tensor([0.4, 0.6]))


def test_three_clusters_are_found() -> None:
    points = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    draw = torch.Generator().manual_seed(1)
    features = points.repeat_interleave(20, 0) + 0.3 * torch.randn(60, 2, generator=draw)
    mixture, _ = fit_mixture(features, torch.zeros(60, dtype=torch.int64), seed=0)
    nearest = torch.cdist(mixture.means, points)
    assert sorted(nearest.argmin(1).tolist()) == [0, 1, 2]
    assert nearest.min(1).values.max() < 0.3
    torch.testing.assert_close(mixture.masses, torch.full((3,), 1 / 3), atol=0.01, rtol=0)


def test_types_are_those_of_the_record_and_masses_sum_to_one() -> None:
    mixture, _ = fit_mixture(*blobs({0: 33, 1: 17, 4: 150}), seed=3)
    assert (mixture.labels.dtype, mixture.masses.dtype) == (torch.int32, torch.float32)
    assert (mixture.means.dtype, mixture.spreads.dtype) == (torch.float32, torch.float32)
    assert mixture.labels.tolist() == sorted(mixture.labels.tolist())
    assert float(mixture.masses.sum()) == pytest.approx(1, abs=1e-6)


def test_a_class_of_nine_rows_is_withheld_and_one_of_ten_is_told() -> None:
    mixture, withheld = fit_mixture(*blobs({0: 9, 1: 10, 2: 50}), seed=0)
    assert set(mixture.labels.tolist()) == {1, 2}
    assert withheld == {0: 9}


def test_a_component_needs_its_rows_even_if_the_class_does_not() -> None:
    features, labels = blobs({0: 12})
    assert fit_mixture(features, labels, min_rows=2, min_component_rows=13, seed=0)[1] == {0: 12}
    assert len(fit_mixture(features, labels, components=9, min_rows=2, min_component_rows=5, seed=0)[0].labels) <= 2


@pytest.mark.parametrize("seed", range(6))
def test_no_component_holds_fewer_than_five_rows(seed: int) -> None:
    features, labels = blobs({0: 10, 1: 14, 2: 23, 3: 60}, dim=3, seed=seed)
    mixture, _ = fit_mixture(features, labels, components=5, seed=seed)
    assert min(held(mixture, features, labels)) >= 5


def test_two_outliers_get_no_component_of_their_own() -> None:
    features, labels = blobs({0: 40})
    features[:2] += 100.0
    mixture, _ = fit_mixture(features, labels, components=3, seed=0)
    assert min(held(mixture, features, labels)) >= 5
    assert float((mixture.means - features[:2].mean(0)).norm(dim=1).min()) > 50


def test_nothing_may_be_told() -> None:
    mixture, withheld = fit_mixture(*blobs({0: 4, 7: 9}), seed=0)
    assert mixture.labels.shape == mixture.masses.shape == (0,)
    assert mixture.means.shape == mixture.spreads.shape == (0, 6)
    assert withheld == {0: 4, 7: 9}


def test_a_client_without_rows() -> None:
    mixture, withheld = fit_mixture(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), seed=0)
    assert (mixture.means.shape, withheld) == ((0, 6), {})


def test_exact_counts_are_not_told() -> None:
    """37 and 53 rows look like 41 and 59 of 100, and like 74 and 106: the share 37/90 is not to be found."""
    one, withheld = fit_mixture(*blobs({0: 37, 1: 53}), components=1, seed=0)
    two, _ = fit_mixture(*blobs({0: 74, 1: 106}), components=1, seed=0)
    torch.testing.assert_close(one.masses, torch.tensor([0.41, 0.59]))
    assert torch.equal(one.masses, two.masses)
    assert withheld == {}
    assert {path[0] for path, _ in contents(one)} == {"labels", "masses", "means", "spreads"}


def test_rows_below_the_floor_do_not_move_what_is_told() -> None:
    features, labels = blobs({0: 30, 1: 40})
    more = torch.cat([features, 7 + torch.rand(9, 6)]), torch.cat([labels, torch.full((9,), 2)])
    alone, together = fit_mixture(features, labels, seed=0)[0], fit_mixture(*more, seed=0)[0]
    assert pack(alone) == pack(together)


def test_same_seed_same_bytes_in_any_order_of_rows() -> None:
    features, labels = blobs({0: 40, 1: 31})
    order = torch.randperm(71, generator=torch.Generator().manual_seed(5))
    frames = {pack(fit_mixture(features[i], labels[i], seed=11)[0]) for i in (slice(None), slice(None), order)}
    assert len(frames) == 1


def test_arguments_stay_as_they_were() -> None:
    features, labels = blobs({0: 20})
    before = features.clone(), labels.clone()
    fit_mixture(features, labels, seed=0)
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])


def test_identical_rows_give_one_component_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture, _ = fit_mixture(torch.ones(20, 4), torch.zeros(20, dtype=torch.int64), seed=0)
    assert mixture.labels.tolist() == [0]
    torch.testing.assert_close(mixture.means, torch.ones(1, 4))


def test_em_that_does_not_converge_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sklearn.mixture.GaussianMixture

    def impatient(count: int, **options: Any) -> Any:
        return real(count, **options | ({"max_iter": 1, "tol": 1e-9} if count > 1 else {}))

    monkeypatch.setattr(sklearn.mixture, "GaussianMixture", impatient)
    assert fit_mixture(*blobs({0: 40}), seed=0)[0].labels.tolist() == [0]


def test_large_offsets_do_not_hurt() -> None:
    features, labels = blobs({0: 30})
    near, far = (fit_mixture(features.double() + shift, labels, components=1, seed=0)[0] for shift in (0.0, 1e6))
    torch.testing.assert_close(near.spreads, far.spreads, rtol=1e-4, atol=1e-6)


def test_features_that_are_not_finite_are_named() -> None:
    features, labels = blobs({0: 20})
    features[3, 1], features[7, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 20 rows"):
        fit_mixture(features, labels, seed=0)


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        (torch.zeros(5), torch.zeros(5), {}, "features are"),
        (torch.zeros(5, 2), torch.zeros(4), {}, "features are"),
        (torch.zeros(5, 2), torch.zeros(5), {"components": 0}, "at least 1"),
        (torch.zeros(5, 2), torch.zeros(5), {"min_component_rows": 0}, "at least 1"),
    ],
)
def test_wrong_arguments(features: Tensor, labels: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_mixture(features, labels, seed=0, **options)


def fields(**changes: Tensor) -> dict[str, Tensor]:
    right = {
        "labels": torch.tensor([0, 1], dtype=torch.int32),
        "masses": torch.tensor([0.25, 0.75]),
        "means": torch.zeros(2, 3),
        "spreads": torch.ones(2, 3),
    }
    return right | changes


def test_a_mixture_travels() -> None:
    mixture = Mixture(**fields())
    back = unpack(Mixture, pack(mixture))
    assert all(torch.equal(getattr(back, name), tensor) for name, tensor in fields().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masses": torch.tensor([1.0])}, "one label and one mass"),
        ({"means": torch.zeros(3, 3)}, "means and spreads"),
        ({"spreads": torch.ones(2, 2)}, "means and spreads"),
        ({"means": torch.full((2, 3), torch.nan)}, "finite"),
        ({"masses": torch.tensor([0.0, 1.0])}, "positive masses"),
        ({"spreads": -torch.ones(2, 3)}, "negative spread"),
        ({"masses": torch.tensor([0.5, 0.6])}, "sum to 1"),
    ],
)
def test_an_impossible_mixture_is_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**fields(**changes))


def test_a_frame_with_an_impossible_mixture_is_refused() -> None:
    mixture = Mixture(**fields())
    mixture.masses[0] = 40.0
    with pytest.raises(WireError, match="sum to 1"):
        unpack(Mixture, pack(mixture))
