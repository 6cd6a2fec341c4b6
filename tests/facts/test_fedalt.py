"""FedALT: the others' mean without oneself, one's own untouched, r (d + k) numbers a layer (methods.md 17)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celora.algorithms.fedalt import FedALT, Up
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.messages import Plan
from celora.models.backbone import load
from celora.models.settings import Adapter, Model
from tests.classifier import initial
from tests.facts.payloads import DIM, HEAD, LAYERS, RANK, rounds
from tests.toy import CLIENTS, D_IN, D_OUT, Federation, image
from tests.toy import RANK as SMALL


def factors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"layer.A": torch.randn(SMALL, D_IN, generator=draw), "layer.B": torch.randn(D_OUT, SMALL, generator=draw)}


def received(clients: dict[str, dict[str, Tensor]], client: str) -> dict[str, Tensor]:
    algorithm = FedALT()
    server = algorithm.aggregate(algorithm.server_init({}, ()), Heard({c: Up(w, 7) for c, w in clients.items()}))
    return dict(algorithm.send(server, client).weights)


def test_the_rest_of_a_clients_world_is_the_mean_over_all_but_it() -> None:
    """The server takes a client out of a sum; here the others are stacked."""
    clients = {f"c{seed}": factors(seed) for seed in range(5)}
    for client in clients:
        for name, got in received(clients, client).items():
            stacked = torch.stack([w[name.removesuffix("2")] for c, w in clients.items() if c != client])
            torch.testing.assert_close(got, stacked.mean(0))


def test_taking_out_a_client_that_is_a_million_times_larger_loses_no_digits_of_the_others() -> None:
    small = {f"c{seed}": factors(seed) for seed in range(3)}
    clients = {**small, "large": {name: 1e6 * w for name, w in factors(9).items()}}
    for name, got in received(clients, "large").items():
        stacked = torch.stack([w[name.removesuffix("2")] for w in small.values()])
        torch.testing.assert_close(got, stacked.mean(0))


def test_what_a_client_does_itself_changes_nothing_of_what_it_receives() -> None:
    clients = {f"c{seed}": factors(seed) for seed in range(3)}
    changed = {**clients, "c0": factors(8)}
    torch.testing.assert_close(received(clients, "c0"), received(changed, "c0"))
    assert not torch.allclose(received(clients, "c1")["layer.A2"], received(changed, "c1")["layer.A2"])


def test_the_mean_of_the_factors_is_not_the_mean_of_the_updates() -> None:
    clients = {f"c{seed}": factors(seed) for seed in range(4)}
    got = received(clients, "c0")
    exact = torch.stack([w["layer.B"] @ w["layer.A"] for c, w in clients.items() if c != "c0"]).mean(0)
    assert float((got["layer.B2"] @ got["layer.A2"] - exact).norm() / exact.norm()) > 0.1


def test_no_aggregate_takes_the_place_of_a_clients_own_and_the_rest_is_not_trained() -> None:
    """In a run: what a client keeps is what it sent; the next round's training starts there."""
    federation = Federation(FedALT())
    for rnd in federation.run(Plan(rounds=3)):
        server: Any = rnd.server
        for client in CLIENTS:
            local = federation.private(federation.stores[client])
            assert image(local.own) == image(dict(server.adapters[client]))
            if rnd.index in (2, 3):
                personal: Any = federation.stores[client][f"personal@{rnd.index}"]
                before: Any = federation.stores[client][f"received@{rnd.index - 1}"]
                for name in ("layer.A2", "layer.B2"):
                    assert image(personal.weights[name]) == image(before.weights[name])
                    assert personal.weights[name].any()


def test_both_factors_travel_up_and_the_mean_of_the_others_down() -> None:
    """12 matrices at r = 8 and d = 384: 12·8·(384 + 384)·4 = 294,912 bytes each way."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FedALT()))
    size = int(LAYERS * FedALT.info.floats(RANK, DIM, DIM) * 4)
    assert size == 294_912
    assert (first.up_payload, first.down_payload) == (size, 0)
    assert (second.up_payload, second.down_payload, closing.down_payload) == (size, size, size)
    assert (second.head_up, second.head_down) == (0, 0)
    shared = rounds(FedALT(head="shared"))[1].traffic["a"]
    assert (shared.head_up, shared.head_down, shared.down_payload) == (HEAD, HEAD, size)


def test_a_client_that_is_alone_gets_nothing_in_any_round() -> None:
    assert [rnd.traffic["a"].down_payload for rnd in rounds(FedALT(), "a")] == [0, 0, 0]


def test_the_start_is_the_frozen_backbone_and_gates_sum_to_1() -> None:
    adapter = Adapter(targets=("q_proj", "v_proj"), rank=8)
    backbone = load(Model(backbone="random-vit", device="cpu"), adapter, Path())
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    for w in modules(initial(backbone, adapter, FedALT().family, 3, seed=0)).values():
        assert not FedALT().family.delta(x, w).any()
        assert 0 < float(w["G"].abs().max()) <= 1 / 8  # kaiming_uniform_(a=√5) at d = 64
        alike = {**w, "A2": w["A"], "B": torch.ones_like(w["B"]), "B2": torch.ones_like(w["B"])}
        torch.testing.assert_close(FedALT().family.delta(x, alike), x @ w["A"].T @ alike["B"].T)
