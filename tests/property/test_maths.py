"""Properties of celora.maths on arbitrary inputs, with a linear program as the independent reference for transport."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from celora.maths.cka import cka
from celora.maths.distances import distance_matrix
from celora.maths.mixtures import fit_mixture
from celora.maths.transport import least_costs, plan, transport
from celora.maths.weights import combine, kernel, row_weights
from tests.toy import least_cost

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(["gaussian", "inverse", "linear"])
combinations = st.sampled_from(["mean", "product", "geometric"])


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix[order][:, order]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@few
@given(st.integers(1, 7), st.integers(1, 7), seeds, st.booleans(), st.floats(1e-3, 1e6))
def test_transport_equals_the_linear_program(n: int, m: int, seed: int, ties: bool, scale: float) -> None:
    """With `ties`, masses and costs are small whole numbers: many equal optima, many zero masses."""
    rng = np.random.default_rng(seed)
    if ties:
        a = rng.multinomial(6, np.ones(n) / n) / 6.0
        b = rng.multinomial(6, np.ones(m) / m) / 6.0
        cost = scale * rng.integers(0, 3, (n, m)).astype(float)
    else:
        a, b, cost = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m)), scale * rng.random((n, m))
    t = (torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(cost))
    assert transport(*t) == pytest.approx(least_cost(*t), rel=1e-8, abs=1e-9 * scale)
    moved = plan(*t)
    assert float(moved.min()) >= 0
    torch.testing.assert_close(moved.sum(1), t[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(moved.sum(0), t[1], atol=1e-9, rtol=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), seeds, st.booleans(), st.integers(0, 2), st.integers(0, 2))
def test_vertices_of_the_dual_give_the_optimum(
    n: int, m: int, seed: int, ties: bool, row_padding: int, padding: int
) -> None:
    """With `ties`, many equal optima and zero masses; padding repeats an atom with mass 0."""
    rng = np.random.default_rng(seed)
    if ties:
        a, b = (rng.multinomial(4, np.ones(k) / k, size=6) / 4.0 for k in (n, m))
    else:
        a, b = (rng.dirichlet(np.ones(k), size=6) for k in (n, m))
    cost = rng.integers(0, 4, (6, n, m)).astype(float) if ties else rng.random((6, n, m))
    problems = [tuple(map(torch.from_numpy, problem)) for problem in zip(a, b, cost, strict=True)]
    rows, columns = [*range(n), *[0] * min(row_padding, 3 - n)], [*range(m), *[0] * padding]
    a, b, cost = a[:, rows], b[:, columns], cost[:, rows][:, :, columns]
    a[:, n:] = b[:, m:] = 0
    found = least_costs(*(torch.from_numpy(x) for x in (a.T, b.T, cost.transpose(1, 2, 0))))
    assert found.tolist() == pytest.approx([least_cost(*problem) for problem in problems], rel=1e-9, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 8), seeds)
def test_a_summary_keeps_to_the_floor(counts: list[int], components: int, floor: int, seed: int) -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    features = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed)) * (1 + labels[:, None])
    mixture, withheld = fit_mixture(features, labels, components=components, min_component_rows=floor, seed=seed)
    told = [c for c, n in enumerate(counts) if n >= 10]
    assert withheld == {c: n for c, n in enumerate(counts) if 0 < n < 10}
    assert sorted(set(mixture.labels.tolist())) == told
    for label in told:
        assert 1 <= int((mixture.labels == label).sum()) <= min(components, counts[label] // floor)
    if told:
        assert float(mixture.masses.sum()) == pytest.approx(1, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=5), seeds)
def test_distances_and_kernels_follow_a_permutation(counts: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    clients = [fit_mixture(torch.randn(n, 3, generator=draw), torch.arange(n) % 2, seed=seed)[0] for n in counts]
    order = torch.randperm(len(clients), generator=draw)
    distance = distance_matrix(clients)
    known = distance[~distance.isnan()]
    assert bool((known >= 0).all())
    moved = distance_matrix([clients[int(i)] for i in order])
    torch.testing.assert_close(moved, permuted(distance, order), rtol=1e-8, atol=1e-8, equal_nan=True)
    for kind in ("gaussian", "inverse", "linear"):
        similarity = kernel(distance, kind)
        assert bool((similarity.nan_to_num(0.5) >= 0).all())
        assert bool((similarity.nan_to_num(0.5) <= 1).all())
        assert similarity.diagonal().tolist() == [1.0] * len(clients)
        close(kernel(permuted(distance, order), kind), permuted(similarity, order))


@few
@given(st.integers(1, 6), st.integers(1, 3), st.integers(4, 9), seeds, st.sampled_from(["linear", "debiased"]))
def test_cka_is_bounded_and_follows_a_permutation(m: int, layers: int, r: int, seed: int, estimator: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    cores, order = torch.randn(m, 2, r, r, generator=draw), torch.randperm(m, generator=draw)
    similarity = cka(cores, estimator)  # type: ignore[arg-type]
    assert float(similarity.max()) <= 1
    assert float(similarity.min()) >= (0 if estimator == "linear" else -1)
    close(cka(cores[order], estimator), permuted(similarity, order))  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 7),
    seeds,
    st.tuples(kinds, combinations, st.floats(0, 1), st.booleans()),
    st.fixed_dictionaries(
        {
            "normalise": st.sampled_from(["sum", "softmax"]),
            "self_weight": st.sampled_from(["natural", "excluded", "fixed"]),
            "temperature": st.floats(1e-3, 10),
            "self_share": st.floats(0, 1),
        }
    ),
)
def test_any_options_give_rows_that_sum_to_one_and_follow_a_permutation(
    m: int, seed: int, likeness: tuple[Any, Any, float, bool], options: dict[str, Any]
) -> None:
    kind, how, share, count_rows = likeness
    draw = torch.Generator().manual_seed(seed)
    distance = torch.cdist(*[torch.rand(m, 2, generator=draw, dtype=torch.float64)] * 2)
    silent = torch.rand(m, generator=draw) < 0.3
    distance[silent[:, None] | silent] = torch.nan
    model = 2 * torch.rand(m, m, generator=draw, dtype=torch.float64) - 1
    rows = torch.randint(1, 100, (m,), generator=draw) if count_rows else None
    before = distance.clone(), model.clone()

    def weights(distance: Tensor, model: Tensor, rows: Tensor | None) -> Tensor:
        return row_weights(combine(kernel(distance, kind), model, how, share), rows=rows, **options)

    found = weights(distance, model, rows)
    torch.testing.assert_close(found.sum(1), torch.ones(m, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(found.min()) >= 0
    if m > 1 and options["self_weight"] == "excluded":
        assert found.diagonal().tolist() == [0.0] * m
    order = torch.randperm(m, generator=draw)
    moved = weights(permuted(distance, order), permuted(model, order), None if rows is None else rows[order])
    close(moved, permuted(found, order))
    close(distance, before[0])
    close(model, before[1])
