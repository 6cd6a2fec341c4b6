"""celora.maths.weights: kernels, combinations, rows that sum to 1."""

from math import exp, nan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.maths.weights import combine, kernel, row_weights


def square(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


ONES = torch.ones(3, 3, dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
DISTANCE = square([0, 1, 2], [1, 0, 4], [2, 4, 0])  # median 2, largest 4
SIMILARITY = square([1.0, 0.5, -0.2], [0.5, 1.0, 0.25], [-0.2, 0.25, 1.0])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gaussian", [exp(-1 / 8), exp(-1 / 2), exp(-2)]),
        ("inverse", [1 / 1.5, 1 / 2, 1 / 3]),
        ("linear", [0.75, 0.5, 0.0]),
    ],
)
def test_kernels_by_hand_in_any_unit(kind: Any, values: list[float]) -> None:
    near, typical, far = values
    expected = square([1, near, typical], [near, 1, far], [typical, far, 1])
    torch.testing.assert_close(kernel(DISTANCE, kind), expected)
    torch.testing.assert_close(kernel(1000 * DISTANCE.float(), kind), expected)


@pytest.mark.parametrize("kind", ["gaussian", "inverse", "linear"])
def test_kernel_where_little_is_known(kind: Any) -> None:
    assert kernel(torch.zeros(1, 1), kind).tolist() == [[1.0]]
    assert kernel(torch.zeros(0, 0), kind).shape == (0, 0)
    assert torch.equal(kernel(torch.zeros(3, 3), kind), ONES)
    unknown = square([0, 3, nan], [3, 0, nan], [nan, nan, 0])
    similarity = kernel(unknown, kind)
    assert torch.equal(similarity.isnan(), unknown.isnan())
    assert similarity.diagonal().tolist() == [1.0] * 3
    assert kernel(unknown.fill_(nan), kind).diagonal().tolist() == [1.0] * 3


def test_the_width_is_positive_if_anybody_differs() -> None:
    distance = torch.zeros(5, 5, dtype=torch.float64)
    distance[0, 1:] = distance[1:, 0] = 2.0  # one stranger: the median of 20 distances is 0
    similarity = kernel(distance)
    torch.testing.assert_close(similarity[0, 1:], torch.full((4,), exp(-0.5), dtype=torch.float64))
    assert torch.equal(similarity[1:, 1:], torch.ones(4, 4, dtype=torch.float64))


def test_combinations_by_hand() -> None:
    data, model = torch.full((2, 2), 0.25), torch.full((2, 2), 0.81)
    assert float(combine(data, model, "mean", 0.3)[0, 1]) == pytest.approx(0.3 * 0.25 + 0.7 * 0.81)
    assert float(combine(data, model, "product", 0.3)[0, 1]) == pytest.approx(0.2025)
    assert float(combine(data, model, "geometric", 0.5)[0, 1]) == pytest.approx(0.45)


@pytest.mark.parametrize("how", ["mean", "geometric"])
def test_share_one_is_the_data_and_share_zero_the_model(how: Any) -> None:
    data, model = torch.rand(4, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    data[0, 1] = model[1, 2] = 0.0
    torch.testing.assert_close(combine(data, model, how, 1.0), data)
    torch.testing.assert_close(combine(data, model, how, 0.0), model)


@pytest.mark.parametrize("how", ["mean", "product", "geometric"])
def test_unknown_data_leaves_the_model(how: Any) -> None:
    data = square([1, nan], [nan, 1])
    model = square([1, 0.3], [0.3, 1])
    torch.testing.assert_close(combine(data, model, how, 0.9), model)


def test_negative_likeness_counts_as_none_where_powers_are_taken() -> None:
    data, model = square([1, 0.5], [nan, 1]), square([1, -0.4], [-0.4, 1])
    assert combine(data, model, "product").tolist() == [[1, 0], [0, 1]]
    assert combine(data, model, "geometric").tolist() == [[1, 0], [0, 1]]
    torch.testing.assert_close(combine(data, model), square([1, 0.05], [-0.4, 1]))


def test_sum_by_hand() -> None:
    expected = square([2 / 3, 1 / 3, 0], [2 / 7, 4 / 7, 1 / 7], [0, 0.2, 0.8])
    torch.testing.assert_close(row_weights(SIMILARITY), expected)
    expected = square([0, 1, 0], [2 / 3, 0, 1 / 3], [0, 1, 0])
    torch.testing.assert_close(row_weights(SIMILARITY, self_weight="excluded"), expected)
    torch.testing.assert_close(row_weights(SIMILARITY, self_weight="fixed", self_share=0.4), 0.4 * EYE + 0.6 * expected)


def test_softmax_is_softmax_and_excludes_before_it_normalises() -> None:
    torch.testing.assert_close(
        row_weights(SIMILARITY, normalise="softmax", temperature=0.2), torch.softmax(SIMILARITY / 0.2, dim=1)
    )
    others = SIMILARITY.masked_fill(EYE.bool(), -torch.inf)
    torch.testing.assert_close(
        row_weights(SIMILARITY, normalise="softmax", temperature=0.2, self_weight="excluded"),
        torch.softmax(others / 0.2, dim=1),
    )


@pytest.mark.parametrize("self_weight", ["natural", "excluded", "fixed"])
def test_a_tiny_temperature_picks_the_most_alike(self_weight: Any) -> None:
    weights = row_weights(SIMILARITY, normalise="softmax", temperature=1e-6, self_weight=self_weight, self_share=0.0)
    assert weights.argmax(1).tolist() == ([0, 1, 2] if self_weight == "natural" else [1, 0, 1])
    torch.testing.assert_close(weights.max(1).values, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("normalise", ["sum", "softmax"])
def test_rows_multiply(normalise: Any) -> None:
    """A client with twice the rows counts as two clients that are alike."""
    weights = row_weights(SIMILARITY, normalise=normalise, rows=torch.tensor([1, 2, 1]))
    twice = [0, 1, 1, 2]
    doubled = row_weights(SIMILARITY[twice][:, twice], normalise=normalise)[[0, 1, 3]]
    torch.testing.assert_close(weights, torch.stack([doubled[:, 0], doubled[:, 1] * 2, doubled[:, 3]], dim=1))


def test_a_row_without_mass_keeps_its_own_core_or_asks_all_others() -> None:
    nobody = torch.zeros(3, 3)
    assert torch.equal(row_weights(nobody), EYE)
    assert torch.equal(row_weights(-ONES), EYE)
    assert torch.equal(row_weights(nobody, self_weight="excluded"), (1 - EYE) / 2)
    assert torch.equal(row_weights(nobody, self_weight="fixed", self_share=0.2), EYE)


@pytest.mark.parametrize("normalise", ["sum", "softmax"])
@pytest.mark.parametrize("self_weight", ["natural", "excluded", "fixed"])
def test_one_client_keeps_itself(normalise: Any, self_weight: Any) -> None:
    weights = row_weights(torch.ones(1, 1), normalise=normalise, self_weight=self_weight, self_share=0.0)
    assert weights.tolist() == [[1.0]]


def test_equal_similarities_are_a_plain_mean() -> None:
    torch.testing.assert_close(row_weights(0.3 * ONES), ONES / 3)
    torch.testing.assert_close(row_weights(0.3 * ONES, normalise="softmax"), ONES / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel(torch.zeros(2, 3)), r"\(m, m\)"),
        (lambda: kernel(torch.zeros(2, 2), "cosine"), "found kernel 'cosine'"),  # type: ignore[arg-type]
        (lambda: combine(ONES, torch.ones(2, 2)), r"shapes \(3, 3\) and \(2, 2\)"),
        (lambda: combine(ONES, ONES, "sum"), "found combination 'sum'"),  # type: ignore[arg-type]
        (lambda: combine(ONES, ONES, share=1.5), "share of 1.5"),
        (lambda: combine(ONES, ONES * nan), "NaN among model"),
        (lambda: row_weights(ONES * nan), "no weight follows"),
        (lambda: row_weights(ONES, normalise="max"), "found 'max'"),  # type: ignore[arg-type]
        (lambda: row_weights(ONES, self_weight="none"), "'none'"),  # type: ignore[arg-type]
        (lambda: row_weights(ONES, temperature=0), "temperature 0"),
        (lambda: row_weights(ONES, self_share=sqrt(2)), "self_share 1.4"),
        (lambda: row_weights(ONES, rows=torch.tensor([1, 0, 1])), "one positive number"),
        (lambda: row_weights(ONES, rows=torch.ones(2)), "each of 3 clients"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
