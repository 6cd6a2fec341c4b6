"""FedMosaic: rows of W sum to 1 without oneself, an exact average, r² + r numbers (methods.md 19; part V, 1, 2, 5)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.fedmosaic import FedMosaic, Up
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.messages import Plan
from celora.models.backbone import load
from celora.models.settings import Adapter, Model
from tests.classifier import initial
from tests.facts.payloads import DIM, HEAD, LAYERS, RANK, rounds
from tests.toy import CLIENTS, Federation, Population, image
from tests.toy import RANK as SMALL

INITIAL = Population(FedMosaic().family).initial
LENGTH = 18  # numbers of the toy's head


def ups(count: int) -> dict[str, Up]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"c{i}": Up(
            {
                "layer.P": torch.randn(SMALL, SMALL, generator=draw),
                "layer.Q": torch.randn(1, SMALL, generator=draw),
            },
            1 + i,
            torch.randn(LENGTH, generator=draw),
        )
        for i in range(count)
    }


def served(heard: dict[str, Up], **fields: Any) -> tuple[FedMosaic, Any]:
    algorithm = FedMosaic(**fields)
    return algorithm, algorithm.aggregate(algorithm.server_init(INITIAL, ()), Heard(heard))


@pytest.mark.parametrize("temperature", [0.01, 0.2, 5.0])
def test_rows_of_w_sum_to_1_and_nobody_is_in_its_own(temperature: float) -> None:
    _, server = served(ups(7), temperature=temperature)
    weights = server.mixing.weights
    assert not weights.diagonal().any()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64))


def test_w_is_the_authors_softmax_with_a_diagonal_of_minus_a_billion() -> None:
    heard = ups(6)
    _, server = served(heard, temperature=0.3)
    v = torch.stack([up.summary for up in heard.values() if up.summary is not None]).double()
    s = torch.stack([torch.nn.functional.cosine_similarity(row[None], v) for row in v])
    torch.testing.assert_close(server.mixing.weights, (s.fill_diagonal_(-1e9) / 0.3).softmax(1))


def test_what_a_client_receives_does_as_the_weighted_mean_of_the_others_does() -> None:
    """As functions of x, Q included."""
    heard, x = ups(5), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    algorithm, server = served(heard)
    w = modules(INITIAL)["layer"]

    def says(p: Tensor, q: Tensor) -> Tensor:
        return (x @ w["A"].T @ p.T + q) @ w["B"].T

    each = torch.stack([says(up.weights["layer.P"], up.weights["layer.Q"]) for up in heard.values()])
    for i, client in enumerate(heard):
        got = algorithm.send(server, client).weights
        mean = (server.mixing.weights[i].float()[:, None, None] * each).sum(0)
        torch.testing.assert_close(says(got["layer.P2"], got["layer.Q2"]), mean, atol=1e-5, rtol=1e-5)


def test_what_a_client_does_itself_changes_nothing_of_what_it_receives() -> None:
    heard = ups(4)
    changed = {**heard, "c0": Up({n: 2 * w for n, w in heard["c0"].weights.items()}, 9, heard["c0"].summary)}
    (algorithm, one), (_, other) = served(heard), served(changed)
    assert image(algorithm.send(one, "c0")) == image(algorithm.send(other, "c0"))
    assert image(algorithm.send(one, "c1")) != image(algorithm.send(other, "c1"))


def test_no_average_takes_the_place_of_a_clients_own_and_what_it_receives_is_not_trained() -> None:
    federation = Federation(FedMosaic())
    for rnd in federation.run(Plan(rounds=3)):
        server: Any = rnd.server
        for client in CLIENTS:
            assert image(federation.private(federation.stores[client]).own) == image(dict(server.cores[client]))
            if rnd.index in (2, 3):
                personal: Any = federation.stores[client][f"personal@{rnd.index}"]
                before: Any = federation.stores[client][f"received@{rnd.index - 1}"]
                for name in ("layer.P2", "layer.Q2"):
                    assert image(personal.weights[name]) == image(before.weights[name])
                    assert personal.weights[name].any()


def test_clients_with_the_same_task_learn_most_from_each_other() -> None:
    """In the toy c40 and c45, c41 and c46, c42 and c47 label their 264 and more rows by the same rule."""
    clients = ["c40", "c41", "c42", "c45", "c46", "c47"]
    (first, _) = Federation(FedMosaic(batches=99), clients=clients).run(Plan(rounds=1))
    server: Any = first.server
    most = {client: clients[int(row.argmax())] for client, row in zip(clients, server.mixing.weights, strict=True)}
    assert most == {"c40": "c45", "c45": "c40", "c41": "c46", "c46": "c41", "c42": "c47", "c47": "c42"}


def test_noise_is_what_it_says_and_is_drawn_anew() -> None:
    algorithm, gradient = FedMosaic(noise=0.5), torch.full((10_000,), 3.0)
    rng = torch.Generator().manual_seed(0)
    one, two = (algorithm.blurred(gradient, rng) for _ in range(2))
    assert one is not None and two is not None
    assert float((one - gradient).std()) == pytest.approx(1.5, rel=0.05)
    assert float((one - two).norm()) > 1


def test_r_squared_and_r_numbers_travel_and_a_sketch_besides() -> None:
    """12 matrices at r = 8: 12·(8² + 8)·4 = 3,456 bytes each way, and 256 numbers of a gradient up."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FedMosaic()))
    size = int(LAYERS * FedMosaic.info.floats(RANK, DIM, DIM) * 4)
    assert size == 3_456
    assert (first.up_payload, first.summary, first.down_payload) == (size, 1_024, 0)
    assert (second.up_payload, second.summary, second.down_payload) == (size, 1_024, size)
    assert (closing.down_payload, second.head_up) == (size, 0)
    shared = rounds(FedMosaic(head="shared"))[1].traffic["a"]
    assert (shared.head_up, shared.head_down, shared.up_payload) == (HEAD, HEAD, size)


def test_the_start_is_the_frozen_backbone_between_orthonormal_bases() -> None:
    adapter = Adapter(targets=("q_proj", "v_proj"), rank=8)
    backbone = load(Model(backbone="random-vit", device="cpu"), adapter, Path())
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    for w in modules(initial(backbone, adapter, FedMosaic().family, 3, seed=0)).values():
        assert not FedMosaic().family.delta(x, w).any()
        torch.testing.assert_close(w["A"] @ w["A"].T, torch.eye(8))
        torch.testing.assert_close(w["B"].T @ w["B"], torch.eye(8))
