"""celora.maths.transport and celora.maths.distances: plans, distances of mixtures, the matrix of all clients."""

import itertools
from math import sqrt

import ot
import pytest
import torch
from torch import Tensor

from celora.maths.distances import (
    class_distances,
    component_costs,
    distance_matrix,
    mixture_distance,
    pair_distances,
)
from celora.maths.mixtures import Mixture
from celora.maths.nearest import moments
from celora.maths.transport import plan, transport
from tests.toy import least_cost


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masses(count: int, seed: int) -> Tensor:
    raw = torch.rand(count, generator=draw(seed), dtype=torch.float64) + 0.01
    return raw / raw.sum()


def mixture(labels: list[int], dim: int = 4, seed: int = 0) -> Mixture:
    g, count = draw(seed), len(labels)
    return Mixture(
        labels=torch.tensor(labels, dtype=torch.int32),
        masses=masses(count, seed).float(),
        means=torch.randn(count, dim, generator=g),
        spreads=torch.rand(count, dim, generator=g),
    )


def shuffled(mixture: Mixture, seed: int = 0) -> Mixture:
    order = torch.randperm(len(mixture.labels), generator=draw(seed))
    return Mixture(*(t[order] for t in (mixture.labels, mixture.masses, mixture.means, mixture.spreads)))


def unit(x: Tensor) -> Tensor:
    return x.double() / x.double().sum()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 2), (3, 3), (4, 7), (12, 12), (30, 25)])
def test_transport_equals_the_linear_program_and_the_plan_has_its_marginals(shape: tuple[int, int]) -> None:
    a, b = masses(shape[0], 1), masses(shape[1], 2)
    cost = torch.rand(shape, generator=draw(3), dtype=torch.float64) * 50
    moved = plan(a, b, cost)
    assert transport(a, b, cost) == pytest.approx(least_cost(a, b, cost), rel=1e-9)
    assert float(moved.min()) >= 0
    torch.testing.assert_close(moved.sum(1), a, atol=1e-9, rtol=0)
    torch.testing.assert_close(moved.sum(0), b, atol=1e-9, rtol=0)


def test_masses_may_be_zero_equal_or_of_any_total() -> None:
    cost = torch.arange(12.0).reshape(3, 4)
    a, b = torch.tensor([0.0, 4.0, 4.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    assert transport(a, b, cost) == pytest.approx(least_cost(a, b, cost))
    assert transport(a, b, torch.zeros(3, 4)) == 0
    assert transport(a, b, -cost) == pytest.approx(-8 * 7.5)


@pytest.mark.parametrize(
    ("a", "b", "cost", "message"),
    [
        ([1.0], [0.5, 0.5], torch.zeros(2, 1), "shape"),
        ([], [], torch.zeros(0, 0), "none empty"),
        ([1.0], [0.5, 0.4], torch.zeros(1, 2), "same positive mass"),
        ([0.0], [0.0], torch.zeros(1, 1), "same positive mass"),
        ([1.5, -0.5], [1.0], torch.zeros(2, 1), "not negative"),
        ([1.0], [1.0], torch.full((1, 1), torch.nan), "finite"),
    ],
)
def test_impossible_problems(a: list[float], b: list[float], cost: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(torch.tensor(a), torch.tensor(b), cost)


def test_component_costs_are_the_wasserstein_distances_of_gaussians() -> None:
    """POT's closed form for full covariances, on diagonal ones."""
    p, q = mixture([0, 0], seed=1), mixture([0, 1, 1], seed=2)
    costs = component_costs(p, q)
    for g, h in itertools.product(range(2), range(3)):
        covariances = (torch.diag(p.spreads[g].square()), torch.diag(q.spreads[h].square()))
        exact = ot.gaussian.bures_wasserstein_distance(p.means[g], q.means[h], *covariances)
        assert float(costs[g, h]) == pytest.approx(float(exact) ** 2, rel=1e-4)
    assert costs.dtype == torch.float64
    assert component_costs(p, p).diagonal().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("per_class", [1, 2, 3, 5])
def test_class_distances_equal_the_linear_program(per_class: int) -> None:
    """Two classes against three, one of them with fewer components: padding must not count."""
    p = mixture([7] * per_class + [1] * per_class, seed=1)
    q = mixture([3] * per_class + [0] * per_class + [9], seed=2)
    found, costs = class_distances(p, q), component_costs(p, q)
    assert found.shape == (2, 3)
    for row, column in itertools.product(range(2), range(3)):
        mine, other = p.labels == [1, 7][row], q.labels == [0, 3, 9][column]
        a, b = unit(p.masses[mine]), unit(q.masses[other])
        exact = least_cost(a, b, costs[mine][:, other])
        assert float(found[row, column]) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("label_cost", [0.0, 1.0, 2.5])
def test_mixture_distance_equals_the_sum_written_out(label_cost: float) -> None:
    p, q = mixture([0, 0, 0, 2, 2], seed=3), mixture([2, 2, 5, 5], seed=4)
    between = class_distances(p, q)
    rows, columns = [0, 0, 0, 1, 1], [0, 0, 1, 1]
    cost = component_costs(p, q) + label_cost * between[rows][:, columns]
    exact = least_cost(unit(p.masses), unit(q.masses), cost)
    assert mixture_distance(p, q, label_cost=label_cost) == pytest.approx(sqrt(exact), rel=1e-9)


def test_two_single_components_by_hand() -> None:
    """Means 3 apart, spreads 4 apart: w2 = 5; the label term doubles the square."""
    one = Mixture(torch.tensor([0]), torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
    two = Mixture(torch.tensor([4]), torch.ones(1), torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 5.0]]))
    assert mixture_distance(one, two, label_cost=0) == pytest.approx(5)
    assert mixture_distance(one, two) == pytest.approx(5 * sqrt(2))


def test_a_distance_does_not_depend_on_the_order_of_components_or_on_names_of_labels() -> None:
    p, q = mixture([0, 0, 1, 1], seed=5), mixture([0, 1, 1], seed=6)
    renamed = Mixture(q.labels + 40, q.masses, q.means, q.spreads)
    assert mixture_distance(shuffled(p), shuffled(q)) == pytest.approx(mixture_distance(p, q), rel=1e-12)
    assert mixture_distance(p, renamed) == pytest.approx(mixture_distance(p, q), rel=1e-12)


def test_masses_that_sum_to_nearly_one_are_no_obstacle() -> None:
    p, q = mixture([0, 0], seed=1), mixture([0, 1], seed=2)
    rough = Mixture(p.labels, p.masses * 1.00009, p.means, p.spreads)
    assert mixture_distance(rough, q) == pytest.approx(mixture_distance(p, q), rel=1e-6)


def test_what_cannot_be_compared() -> None:
    nothing = Mixture(torch.zeros(0, dtype=torch.int32), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="empty mixture"):
        mixture_distance(mixture([0]), nothing)
    with pytest.raises(ValueError, match="dimension 4 and 5"):
        mixture_distance(mixture([0]), mixture([0], dim=5))


def test_matrix_is_symmetric_with_zero_diagonal_and_knows_what_it_does_not_know() -> None:
    nothing = Mixture(torch.zeros(0, dtype=torch.int32), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4))
    clients = [mixture([0, 0, 1], seed=1), None, mixture([1, 1], seed=2), nothing, mixture([0, 2], seed=3)]
    distance = distance_matrix(clients)
    told = [0, 2, 4]
    assert distance.dtype == torch.float64
    assert distance.diagonal().tolist() == [0.0] * 5
    assert torch.equal(distance, distance.T) or torch.equal(distance.nan_to_num(-1), distance.T.nan_to_num(-1))
    assert not distance[told][:, told].isnan().any()
    assert int(distance.isnan().sum()) == 20 - 6
    expected = mixture_distance(clients[0], clients[4])  # type: ignore[arg-type]
    assert float(distance[0, 4]) == pytest.approx(expected, rel=1e-9)


def test_matrix_follows_a_permutation_of_the_clients() -> None:
    clients = [mixture([0, 0, 1], seed=s) for s in range(4)] + [None]
    order = [3, 4, 0, 2, 1]
    expected = distance_matrix(clients, label_cost=0.5)[order][:, order]
    found = distance_matrix([clients[i] for i in order], label_cost=0.5)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_matrix_of_nobody_and_of_one(count: int) -> None:
    assert torch.equal(distance_matrix([mixture([0])] * count), torch.zeros(count, count, dtype=torch.float64))


def federation(count: int, components: int = 3, dim: int = 5, offset: float = 0.0) -> list[Mixture]:
    """Clients of 1 to 4 classes of 1 to `components` components, the last of them a copy of the first."""
    clients = []
    for seed in range(count - 1):
        sizes = torch.randint(1, components + 1, (1 + seed % 4,), generator=draw(seed)).tolist()
        one = mixture([label for label, size in enumerate(sizes) for _ in range(size)], dim, seed)
        clients.append(shuffled(Mixture(one.labels, one.masses, one.means + offset, one.spreads), seed))
    return [*clients, clients[0]]


@pytest.mark.parametrize(("components", "label_cost"), [(1, 1.0), (2, 0.0), (3, 1.0), (3, 0.3), (5, 1.0)])
def test_matrix_equals_the_double_loop_across_tiles(components: int, label_cost: float) -> None:
    """More clients than a tile has rows or columns; far from the origin, so that something could cancel."""
    clients = federation(34, components, offset=100.0)
    found = distance_matrix(clients, label_cost=label_cost)
    for i, j in list(itertools.combinations(range(len(clients)), 2))[::3]:
        expected = mixture_distance(clients[i], clients[j], label_cost=label_cost)
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-9)
    assert float(found[0, -1]) == 0


def test_equal_mixtures_are_at_zero_in_whatever_order_their_components_are() -> None:
    clients = [shuffled(mixture([0, 0, 0, 1, 1, 2], dim=30, seed=3), seed) for seed in range(5)]
    assert not bool(distance_matrix(clients).any())


@pytest.mark.parametrize("old", [0, 1, 20, 36, 37])
def test_matrix_of_some_that_are_known_and_some_that_are_new_is_the_matrix_of_all(old: int) -> None:
    clients: list[Mixture | None] = [*federation(35), None, mixture([0, 1], 5, seed=99)]
    before = distance_matrix(clients[:old])
    found, all_at_once = distance_matrix(clients, known=before), distance_matrix(clients)
    assert torch.equal(found[:old, :old].nan_to_num(-1), before.nan_to_num(-1))
    torch.testing.assert_close(found, all_at_once, rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (torch.zeros(2, 3), r"\(k, k\): found \(2, 3\)"),
        (torch.zeros(4, 4), "first k of 3"),
        (torch.full((2, 2), torch.nan), "leave them out"),
    ],
)
def test_impossible_known_distances(known: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance_matrix(federation(3), known=known)


def test_distances_of_pairs_are_those_of_the_matrix() -> None:
    clients = federation(20)
    matrix = distance_matrix(clients, label_cost=0.4)
    pairs = torch.tensor([[3, 1], [0, 19], [3, 18], [7, 7], [18, 3], [3, 1]])
    found = pair_distances(clients, pairs, label_cost=0.4)
    torch.testing.assert_close(found, matrix[pairs[:, 0], pairs[:, 1]], rtol=1e-9, atol=0)
    assert pair_distances(clients, torch.zeros(0, 2, dtype=torch.int64)).shape == (0,)
    with pytest.raises(ValueError, match=r"empty mixture.*positions \[1\]"):
        pair_distances([clients[0], mixture([], 5)], torch.tensor([[0, 1]]))


def test_moments_are_those_of_rows_drawn_from_the_mixture() -> None:
    """Means -1 and 3, spreads 1 and 2, masses 1/4 and 3/4: mean 2; variance (1/4)(1 + 9) + (3/4)(4 + 1) = 25/4."""
    one = Mixture(
        torch.tensor([0, 1]), torch.tensor([0.25, 0.75]), torch.tensor([[-1.0], [3.0]]), torch.tensor([[1.0], [2.0]])
    )
    torch.testing.assert_close(moments([one, one]), torch.tensor([[2.0, 2.5]] * 2, dtype=torch.float64))
    assert moments([]).shape == (0, 0)
    with pytest.raises(ValueError, match="no mean"):
        moments([mixture([])])


@pytest.mark.parametrize("label_cost", [0.0, 1.0, 3.0])
def test_distance_of_moments_is_a_lower_bound(label_cost: float) -> None:
    clients = federation(20)
    bound = sqrt(1 + label_cost) * torch.cdist(*[moments(clients)] * 2)
    assert bool((bound <= distance_matrix(clients, label_cost=label_cost) + 1e-6).all())


def test_the_lower_bound_is_reached_by_single_components() -> None:
    clients = [mixture([0], seed=seed) for seed in range(4)]
    torch.testing.assert_close(distance_matrix(clients), sqrt(2) * torch.cdist(*[moments(clients)] * 2))
