"""celora.models.families: draws have addresses, ΔW starts at 0, C folds into B."""

from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch

from celora.core.adapters import Family, Lora, Tri, modules
from celora.errors import ModelError
from celora.models.backbone import Backbone, load
from celora.models.settings import Adapter, Model
from celora.tensors import only, part, select
from tests.classifier import initial

TARGETS = ("q_proj", "v_proj")
Init = Literal["kaiming", "normal", "orthonormal"]


@cache
def vit() -> Backbone:
    return load(Model(backbone="random-vit", device="cpu"), Adapter(targets=TARGETS), Path())


def adapter(init: Init = "kaiming", bases: Literal["shared", "secret"] = "shared", rank: int = 4) -> Adapter:
    return Adapter(targets=TARGETS, init=init, bases=bases, rank=rank)


@pytest.mark.parametrize("family", [Lora(), Tri()], ids=["lora", "tri"])
@pytest.mark.parametrize("init", ["kaiming", "normal", "orthonormal"])
def test_every_start_is_the_frozen_backbone(family: Family, init: Init) -> None:
    if init == "orthonormal" and family == Lora():
        with pytest.raises(ModelError, match="has no C"):
            initial(vit(), adapter(init), family, 3, seed=0)
        return
    weights = initial(vit(), adapter(init), family, 3, seed=0)
    assert {part(name) for name in weights} == {"A", "B", "head"} | ({"C"} if family == Tri() else set())
    assert weights["head.weight"].shape == (3, 64)
    for w in modules(weights).values():
        a, b = family.lora(w)
        assert not (b @ a).any()
        assert a.any()


def test_the_same_address_gives_the_same_weights() -> None:
    one, same, other = (initial(vit(), adapter(), Tri(), 3, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.attention.q_proj.A"], other["layers.0.attention.q_proj.A"])
    assert not torch.equal(one["layers.0.attention.q_proj.A"], one["layers.1.attention.q_proj.A"])


def test_a_name_draws_the_same_whatever_else_is_adapted() -> None:
    wide = Adapter(targets="all-linear", rank=4)
    many = initial(load(Model(backbone="random-vit", device="cpu"), wide, Path()), wide, Lora(), 3, seed=0)
    few = initial(vit(), adapter(), Lora(), 3, seed=0)
    assert len(many) > len(few)
    assert all(torch.equal(few[name], many[name]) for name in few)


def test_initialisations_have_the_published_scales() -> None:
    a = {init: initial(vit(), adapter(init), Tri(), 3, seed=0) for init in ("kaiming", "normal", "orthonormal")}
    name = "layers.0.attention.q_proj"
    assert a["kaiming"][f"{name}.A"].abs().max() <= 1 / 8  # 1/sqrt(64): kaiming_uniform_(a=sqrt(5))
    assert a["kaiming"][f"{name}.A"].abs().max() > 0.9 / 8
    assert a["normal"][f"{name}.A"].std().item() == pytest.approx(1e-3, rel=0.15)
    rows, columns = a["orthonormal"][f"{name}.A"], a["orthonormal"][f"{name}.B"]
    torch.testing.assert_close(rows @ rows.T, torch.eye(4))
    torch.testing.assert_close(columns.T @ columns, torch.eye(4))


def test_a_secret_draws_the_bases_and_nothing_else() -> None:
    shared = initial(vit(), adapter(), Tri(), 3, seed=0)
    secret = initial(vit(), adapter(bases="secret"), Tri(), 3, seed=0, secret=77)
    other_run = initial(vit(), adapter(bases="secret"), Tri(), 3, seed=5, secret=77)
    for name in select(shared, only("A")):
        assert not torch.equal(shared[name], secret[name])
        assert torch.equal(secret[name], other_run[name])
    for name in select(shared, only("B", "C", "head")):
        assert torch.equal(shared[name], secret[name])
    with pytest.raises(ModelError, match="secret seed"):
        initial(vit(), adapter(bases="secret"), Tri(), 3, seed=0)


def test_orthonormal_bases_cannot_outnumber_the_width() -> None:
    with pytest.raises(ModelError, match="65 orthonormal directions of 64"):
        initial(vit(), adapter("orthonormal", rank=65), Tri(), 3, seed=0)


def test_factors_fold_the_core_with_any_mix_of_client_axes() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=g) for shape in [(2, 5), (3, 4, 2), (2, 2)])
    (w,) = modules({"m.A": a, "m.B": b, "m.C": c, "head.bias": torch.zeros(1)}).values()
    got_a, got_b = Tri().lora(w)
    assert got_a is a
    torch.testing.assert_close(got_b, torch.stack([one @ c for one in b]))
    assert Lora().lora({"A": a, "B": b})[1] is b
