"""celora.tensors: named tensors."""

import weakref
from collections.abc import Iterator

import pytest
import torch

from celora.tensors import but, common, flatten, mean, nbytes, on_device, only, part, select

NAMES = ("enc.0.q.A", "enc.0.q.B", "enc.0.q.C", "head.weight", "head.bias", "header.A")
TENSORS = {name: torch.tensor([float(i)]) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.0.attention.self.query.C", "C"),
        ("q.A", "A"),
        ("B", "B"),
        ("head.weight", "head"),
        ("head.dense.bias", "head"),
        ("header.A", "A"),
        ("encoder.head.B", "B"),
    ],
)
def test_the_part_of_a_name_is_its_last_letter_or_the_head(name: str, expected: str) -> None:
    assert part(name) == expected


def test_only_and_but_choose_by_part() -> None:
    assert list(select(TENSORS, only("C"))) == ["enc.0.q.C"]
    assert list(select(TENSORS, only("A", "head"))) == ["enc.0.q.A", "head.weight", "head.bias", "header.A"]
    assert list(select(TENSORS, but("A", "B", "C"))) == ["head.weight", "head.bias"]
    assert select(TENSORS, only()) == {}
    assert list(select(TENSORS, but())) == list(NAMES)


def test_a_mean_counts_a_name_over_its_holders() -> None:
    one, two = {"A": torch.tensor([1.0])}, {"A": torch.tensor([4.0]), "B": torch.tensor([5.0])}
    assert {name: t.tolist() for name, t in mean([(one, 2), (two, 1)]).items()} == {"A": [2.0], "B": [5.0]}


def test_a_weight_of_zero_leaves_its_holder_out() -> None:
    one, two = {"A": torch.tensor([1.0])}, {"A": torch.tensor([4.0])}
    assert mean([(one, 0), (two, 3)])["A"].tolist() == [4.0]


def test_the_mean_of_nobody_is_nothing() -> None:
    assert mean([]) == {}


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [1.0, -1.0]])
def test_weights_without_a_positive_sum_are_refused_with_the_name(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"the weights of 'A' sum to .*; a mean needs a positive sum"):
        mean(({"A": torch.ones(1)}, weight) for weight in weights)


def test_a_mean_holds_one_holders_tensors_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def holders() -> Iterator[tuple[dict[str, torch.Tensor], float]]:
        for number in range(5):
            tensor = torch.full((2,), float(number))
            assert sum(ref() is not None for ref in alive) <= 1  # the one before, which the loop still names
            alive.append(weakref.ref(tensor))
            yield {"A": tensor}, 1.0

    assert mean(holders())["A"].tolist() == [2.0, 2.0]


def test_what_is_one_object_for_several_is_moved_once_and_stays_one() -> None:
    """Else what clients hold in common would be stacked on a GPU, and nowhere else."""
    shared, own = torch.zeros(3), [torch.zeros(2), torch.ones(2)]
    there = on_device([{"A": shared, "B": one} for one in own], torch.device("meta"))
    assert common([one["A"] for one in there]).shape == (3,)
    assert common([one["B"] for one in there]).shape == (2, 2)
    assert all(tensor.is_meta for one in there for tensor in one.values())
    assert on_device([{"A": shared}], torch.device("cpu"))[0]["A"] is shared


def test_flatten_goes_row_by_row_in_the_mappings_order() -> None:
    tensors = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor(5.0)}
    assert flatten(tensors).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert flatten({}).tolist() == []


def test_nbytes_counts_content_in_its_own_dtype() -> None:
    assert nbytes({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.zeros(0)}) == 20
