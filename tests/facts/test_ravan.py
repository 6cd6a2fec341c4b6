"""RAVAN: an exact average between orthonormal bases, H r² numbers a layer (methods.md 18; part V, 1, 2 and 11)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from celora.algorithms.ravan import Ravan, Up
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.problems import Gradient
from celora.errors import ModelError
from celora.models.backbone import load
from celora.models.settings import Adapter, Model
from celora.tensors import only
from tests.classifier import initial
from tests.facts.payloads import DIM, HEAD, LAYERS, RANK, rounds
from tests.toy import Population

N = (3, 1, 6)
WORLD = Population(Ravan().family)


def weights(seed: int) -> dict[str, Tensor]:
    """All of an adapter, in float64; bases are those of the seed."""
    draw = torch.Generator().manual_seed(seed)
    wide = {name: w.double() for name, w in WORLD.initial.items()}
    moved = {name: torch.randn(wide[name].shape, generator=draw, dtype=torch.float64) for name in wide}
    return {**wide, **{name: w for name, w in moved.items() if name[6] in "CS"}}


def update(w: dict[str, Tensor]) -> Tensor:
    a, b = Ravan().family.lora(modules(w)["layer"])
    return b @ a


def average(clients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All weights after the folded cores of these clients were aggregated."""
    algorithm = Ravan(head="frozen")
    sent = [{f"layer.C{h}": c[f"layer.C{h}"] * c[f"layer.S{h}"] for h in range(1, 5)} for c in clients]
    ups = {str(i): Up(cores, n) for i, (cores, n) in enumerate(zip(sent, N, strict=True))}
    server = algorithm.aggregate(algorithm.server_init({}, ()), Heard(ups))
    return {**{name: w.double() for name, w in WORLD.initial.items()}, **server.weights}


def test_the_average_of_the_cores_is_the_average_of_the_updates() -> None:
    clients = [weights(seed) for seed in range(3)]
    exact = torch.stack([n / sum(N) * update(c) for n, c in zip(N, clients, strict=True)]).sum(0)
    assert float(exact.norm()) > 1
    torch.testing.assert_close(update(average(clients)), exact, atol=1e-10, rtol=0)


def test_cores_and_scales_averaged_apart_would_not_be() -> None:
    clients = [weights(seed) for seed in range(3)]
    exact = torch.stack([n / sum(N) * update(c) for n, c in zip(N, clients, strict=True)]).sum(0)
    apart = {
        name: torch.stack([n / sum(N) * c[name] for n, c in zip(N, clients, strict=True)]).sum(0) for name in clients[0]
    }
    assert float((update(apart) - exact).norm() / exact.norm()) > 0.1


def test_four_cores_of_rank_8_travel_both_ways() -> None:
    """12 matrices: 12·4·8²·4 = 12,288 bytes; FedIT sends 294,912 at this rank."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(Ravan()))
    size = int(LAYERS * Ravan.info.floats(RANK, DIM, DIM) * 4)
    assert size == 12_288
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload, closing.up_payload) == (size, size, 0)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def test_who_trains_one_head_of_four_sends_a_quarter() -> None:
    for choose in ("random", "norm"):
        traffic = rounds(Ravan(train_heads=1, choose=choose))[0].traffic["a"]
        assert traffic.up_payload == 12_288 // 4
        assert traffic.up_frame < 12_288 // 4 + HEAD + 200


def test_bases_of_all_heads_are_orthonormal_and_the_start_is_the_frozen_backbone() -> None:
    adapter = Adapter(targets=("q_proj", "v_proj"), rank=8)
    backbone = load(Model(backbone="random-vit", device="cpu"), adapter, Path())
    for w in modules(initial(backbone, adapter, Ravan().family, 3, seed=0)).values():
        torch.testing.assert_close(w["A"] @ w["A"].T, torch.eye(32))
        torch.testing.assert_close(w["B"].T @ w["B"], torch.eye(32))
        a, b = Ravan().family.lora(w)
        assert not (b @ a).any()
    wide = Adapter(targets=("q_proj", "v_proj"), rank=20)
    with pytest.raises(ModelError, match=r"80 orthonormal directions of 64 dimensions; expected a lower adapter\.rank"):
        initial(backbone, wide, Ravan().family, 3, seed=0)


def test_every_core_has_a_gradient_from_the_first_step() -> None:
    learner = WORLD("c0", 1)
    found = Gradient({}, next(learner.batches()), only(*Ravan().family.cores)).alone(learner).gradient
    assert all(bool(gradient.all()) for gradient in found.values())
