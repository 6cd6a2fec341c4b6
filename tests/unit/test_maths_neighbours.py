"""celora.maths.neighbours and celora.maths.nearest: against the matrix of all pairs."""

import pytest
import torch
from torch import Tensor

from celora.maths import nearest, neighbours
from celora.maths.cka import cka, points
from celora.maths.distances import distance_matrix
from celora.maths.mixtures import Mixture
from celora.maths.nearest import moments, nearest_clients
from celora.maths.neighbours import average, likeness, most_alike


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(seed: int) -> Mixture:
    means = drawn(4, 3, seed=seed).float() + 3 * (seed % 3)
    return Mixture(torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4]), means, means.abs())


@pytest.fixture(params=[3, 1024], ids=["many blocks", "one block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", request.param)
    monkeypatch.setattr(neighbours, "ELEMENTS", 1 if request.param == 3 else 2**20)


@pytest.mark.usefixtures("_blocks")
def test_most_alike_are_those_of_the_matrix() -> None:
    cores = drawn(17, 2, 4, 4)
    alike = cka(cores).fill_diagonal_(-torch.inf)
    found = most_alike(points(cores), 5)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), alike.topk(5).indices)
    some = torch.tensor([16, 2, 9])
    assert torch.equal(most_alike(points(cores), 5, rows=some), found[some])


@pytest.mark.usefixtures("_blocks")
def test_taking_half_the_square_finds_the_nearest() -> None:
    x = drawn(17, 3)
    expected = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(16, largest=False).indices
    assert torch.equal(most_alike(x, 16, less=x.square().sum(1) / 2).long(), expected)


@pytest.mark.usefixtures("_blocks")
def test_likeness_is_cka_of_the_listed() -> None:
    cores, listed = drawn(17, 2, 4, 4), torch.randint(17, (17, 3), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(likeness(points(cores), listed), cka(cores).gather(1, listed), rtol=0, atol=1e-6)


def test_average_over_lists_is_that_over_all_with_zeros() -> None:
    values, weights = drawn(6, 2, 3), drawn(6, 2, seed=1)
    listed = torch.tensor([[0, 1], [1, 5], [4, 2], [3, 0], [4, 5], [5, 2]])
    dense = torch.zeros(6, 6, dtype=torch.float64).scatter_(1, listed, weights)
    expected = torch.einsum("ij,jab->iab", dense, values)
    torch.testing.assert_close(average(values, weights, listed), expected)
    torch.testing.assert_close(average(values, dense), expected)
    assert average(values.float(), weights, listed.int()).dtype == torch.float32


@pytest.mark.parametrize("count", [0, 4])
def test_nobody_has_more_neighbours_than_there_are_others(count: int) -> None:
    with pytest.raises(ValueError, match=f"each of 4 clients has 1 to 3 others: found a count of {count}"):
        most_alike(torch.zeros(4, 2), count)


def test_nearest_mixtures_are_those_of_the_bound_with_exact_distances() -> None:
    mixtures = [mixture(seed) for seed in range(30)]
    near, distances = nearest_clients(mixtures, 6, label_cost=0.5)
    bound = torch.cdist(*[moments(mixtures)] * 2).fill_diagonal_(torch.inf)
    assert torch.equal(near.long(), bound.topk(6, largest=False).indices)
    matrix = distance_matrix(mixtures, label_cost=0.5)
    torch.testing.assert_close(distances, matrix.gather(1, near.long()), rtol=1e-9, atol=0)
    all_of_them, distances = nearest_clients(mixtures, 29, label_cost=0.5)
    torch.testing.assert_close(distances, matrix.gather(1, all_of_them.long()), rtol=1e-9, atol=0)


def test_nearest_computes_only_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    mixtures = [mixture(seed) for seed in range(30)]
    near, distances = nearest_clients(mixtures[:27], 6)
    asked, real = [], nearest.pair_distances

    def counting(mixtures: list[Mixture], pairs: Tensor, **options: float) -> Tensor:
        asked.append(pairs)
        return real(mixtures, pairs, **options)

    monkeypatch.setattr(nearest, "pair_distances", counting)
    pairs = torch.stack([torch.arange(27)[:, None].expand_as(near), near], dim=-1).view(-1, 2)
    found = nearest_clients(mixtures, 6, known=(pairs, distances.flatten()))
    assert bool((asked[0] >= 27).any(dim=1).all())
    assert len(asked[0]) > 0
    expected = nearest_clients(mixtures, 6)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=0)
