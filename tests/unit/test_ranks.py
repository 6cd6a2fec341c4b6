"""Clients with ranks of their own: who has which, where they start, and what a frame and the screen make of it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from celora.core.adapters import truncated
from celora.core.screen import screen
from celora.errors import ConfigError
from celora.experiment import resolve
from celora.models.settings import Adapter
from celora.tensors import Tensors, only
from celora.track.disk import folder_name
from celora.wire import Schema, pack, record, unpack

FULL = {"m.A": torch.arange(12.0).view(4, 3), "m.B": torch.arange(8.0).view(2, 4), "head.bias": torch.ones(3)}


@record
class Up:
    weights: Tensors


def test_a_client_has_its_own_rank_or_its_tiers() -> None:
    names = ["a", "b", "c", "d", "e"]
    assert [Adapter(rank=8, ranks={"b": 2}).rank_of(c, names) for c in names] == [8, 2, 8, 8, 8]
    assert [Adapter(rank=8, ranks=(2, 4, 8)).rank_of(c, names) for c in names] == [2, 2, 4, 4, 8]
    assert [Adapter(rank=8).rank_of(c, names) for c in names] == [8] * 5


def test_no_rank_is_larger_than_the_largest() -> None:
    for ranks in ({"b": 9}, (4, 9)):
        with pytest.raises(ValidationError, match="found 9, expected at most rank = 8"):
            Adapter(rank=8, ranks=ranks)


def test_a_lower_rank_is_the_first_rows_and_columns() -> None:
    cut = truncated(FULL, 2)
    assert torch.equal(cut["m.A"], FULL["m.A"][:2])
    assert torch.equal(cut["m.B"], FULL["m.B"][:, :2])
    assert cut["head.bias"] is FULL["head.bias"]
    assert cut["m.A"].untyped_storage().nbytes() == cut["m.A"].nbytes


def test_a_frame_of_a_lower_rank_costs_its_numbers_and_a_few_bytes() -> None:
    schema, low = Schema.of(FULL), truncated(FULL, 2)
    frame, full = pack(Up(low), schema), pack(Up(FULL), schema)
    found = unpack(Up, frame, schema).weights
    assert {name: tensor.tolist() for name, tensor in found.items()} == {name: w.tolist() for name, w in low.items()}
    saved = sum(w.nbytes for w in FULL.values()) - sum(w.nbytes for w in low.values())
    assert len(full) - len(frame) >= saved - 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"m.B": torch.zeros(2, 3)}, r"weights\[m.B\]: found torch.float32 \(2, 3\), expected torch.float32 \(2, 2\)"),
        ({"m.A": torch.zeros(5, 3), "m.B": torch.zeros(2, 5)}, r"found torch.float32 \(5, 3\), expected .* \(4, 3\)"),
        ({"m.A": torch.zeros(0, 3), "m.B": torch.zeros(2, 0)}, r"found torch.float32 \(0, 3\), expected .* \(1, 3\)"),
        ({"m.A": torch.zeros(2, 4)}, r"found torch.float32 \(2, 4\)"),
    ],
)
def test_the_screen_admits_lower_ranks_that_fit_together(change: Any, says: str | None) -> None:
    low = {**{name: w for name, w in truncated(FULL, 2).items() if name != "head.bias"}, **change}
    found = screen(Up(low), Schema.of(FULL), only("A", "B"), mixed_ranks=True)
    assert (found is None) == (says is None)
    if says is not None and found is not None:
        assert re.search(says, found)
    assert screen(Up(low), Schema.of(FULL), only("A", "B")) is not None  # one rank for all: a lower one is foreign


def test_a_reply_may_lack_names_only_where_that_is_allowed() -> None:
    half = {"m.A": FULL["m.A"]}
    assert "1 of 2 tensors are missing" in str(screen(Up(half), Schema.of(FULL), only("A", "B")))
    assert screen(Up(half), Schema.of(FULL), only("A", "B"), partial=True) is None
    assert "2 of 2 tensors are missing" in str(screen(Up({}), Schema.of(FULL), only("A", "B"), partial=True))


def test_models_of_the_clients_own_are_refused_by_methods_for_frozen_backbones(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"model": {"own": ["cnn-1"]}, "algorithm": {"name": "hetlora"}}
    with pytest.raises(
        ConfigError, match=r"model\.own: hetlora is for adapters in a frozen backbone; expected one of local"
    ):
        resolve(tree, tmp_path)
    for name in ("local", "fedit", "ffa-lora", "fedsa-lora", "pfedlora"):
        assert resolve({**tree, "algorithm": {"name": name}}, tmp_path).label == name
    with pytest.raises(ConfigError, match="logits can be mixed where the adapter stands beside the head"):
        resolve({"algorithm": {"name": "pfedlora", "mix": "logit"}}, tmp_path)


def test_ranks_are_refused_by_methods_that_need_one_for_all(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"adapter": {"ranks": [2, 8]}, "algorithm": {"name": "fedit"}}
    with pytest.raises(ConfigError, match="fedit needs one rank for all clients"):
        resolve(tree, tmp_path)
    assert dataclasses.is_dataclass(resolve({"algorithm": {"name": "fedit"}}, tmp_path))


def test_no_ranks_at_all_is_a_mistake() -> None:
    for ranks in ({}, ()):
        with pytest.raises(ValidationError, match="ranks: found none"):
            Adapter(ranks=ranks)


def test_a_clients_folder_stays_within_the_run() -> None:
    names = ["site a", "a/b", "..", "../up", "/abs", "c:\\d", "."]
    assert [folder_name(name) for name in names] == ["site a", "a-b", "client ..", "..-up", "-abs", "c:-d", "client ."]
