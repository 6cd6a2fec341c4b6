"""Means and selections on arbitrary named tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from celora.tensors import but, flatten, mean, nbytes, only, part, select
from tests.toy import image

some = settings(max_examples=40, deadline=None)
numbers = st.floats(-1e3, 1e3, width=32)
NAMES = ("layer.A", "layer.B", "layer.C", "head.weight")
tensors = st.lists(numbers, min_size=4, max_size=4).map(torch.tensor)
holders = st.dictionaries(st.sampled_from(NAMES), tensors, min_size=1)
weighted = st.lists(st.tuples(holders, st.integers(1, 10_000)), min_size=1, max_size=5)

Weighted = list[tuple[dict[str, Tensor], int]]


@some
@given(weighted)
def test_a_mean_stays_in_the_hull_of_those_who_hold_the_name(many: Weighted) -> None:
    found = mean(many)
    assert set(found) == {name for tensors, _ in many for name in tensors}
    for name, tensor in found.items():
        held = torch.stack([tensors[name] for tensors, _ in many if name in tensors])
        slack = 1e-5 * held.abs().amax(0) + 1e-30
        assert bool((tensor >= held.amin(0) - slack).all())
        assert bool((tensor <= held.amax(0) + slack).all())


@some
@given(weighted)
def test_a_mean_is_the_weighted_sum_over_the_holders_alone(many: Weighted) -> None:
    for name, tensor in mean(many).items():
        held = [(tensors[name].double(), weight) for tensors, weight in many if name in tensors]
        expected = sum(w * x for x, w in held) / sum(w for _, w in held)  # type: ignore[operator]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-3)


@some
@given(weighted, st.randoms(use_true_random=False), st.integers(2, 50))
def test_a_mean_depends_on_neither_the_order_nor_the_unit_of_the_weights(many: Weighted, random, unit: int) -> None:  # type: ignore[no-untyped-def]
    others = [(tensors, weight * unit) for tensors, weight in many]
    random.shuffle(others)
    found, expected = mean(others), mean(many)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-3)


@some
@given(weighted)
def test_a_mean_changes_nothing_it_was_given(many: Weighted) -> None:
    before = [image(tensors) for tensors, _ in many]
    found = mean(many)
    for tensor in found.values():
        tensor.zero_()
    assert [image(tensors) for tensors, _ in many] == before


@some
@given(holders, st.integers(1, 10_000))
def test_the_mean_of_copies_is_the_copy(tensors: dict[str, Tensor], weight: int) -> None:
    for name, tensor in mean((tensors, share) for share in (weight, 2 * weight, 1)).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mean_keeps_the_dtype_and_stands_large_weights(dtype: torch.dtype) -> None:
    one = {"layer.A": torch.full((2,), 8.0, dtype=dtype)}
    found = mean([(one, 1 << 20)] * 2)
    assert image(found) == image(one)


@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 8.0), (torch.float32, 2e38), (torch.bfloat16, 2e38)])
def test_a_mean_of_finite_numbers_is_finite(dtype: torch.dtype, number: float) -> None:
    """One client's large number must not become everybody's infinity."""
    one = {"layer.A": torch.full((2,), number, dtype=dtype)}
    torch.testing.assert_close(mean([(one, 10_000), (one, 30_000)]), one, rtol=1e-2, atol=0)


@some
@given(holders, st.sets(st.sampled_from(["A", "B", "C", "head"])))
def test_only_and_but_split_the_names_in_two(tensors: dict[str, Tensor], parts: set[str]) -> None:
    kept, left = select(tensors, only(*parts)), select(tensors, but(*parts))
    assert set(kept) == {name for name in tensors if part(name) in parts}
    assert image({**kept, **left}) == image(tensors)
    assert not kept.keys() & left.keys()
    assert [name for name in tensors if name in kept] == list(kept)


@some
@given(holders)
def test_flatten_holds_every_entry_once_in_order(tensors: dict[str, Tensor]) -> None:
    assert flatten(tensors).tolist() == [number for tensor in tensors.values() for number in tensor.tolist()]
    assert nbytes(tensors) == 4 * len(flatten(tensors)) == 16 * len(tensors)
