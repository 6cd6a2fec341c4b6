"""Fed-SB: an exact average, bases that hold the gradient, r² numbers a round (methods.md 14, IV.1; part V, 1, 2)."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.fed_sb import FedSB, Slopes, Up
from celora.core.adapters import modules
from celora.core.aggregation import Heard
from celora.core.messages import Plan
from celora.core.problems import Gradient
from celora.models.backbone import load
from celora.models.settings import Adapter, Model
from celora.tensors import only, select
from tests.classifier import initial
from tests.facts.payloads import DIM, HEAD, LAYERS, RANK, rounds
from tests.toy import CLIENTS, D_IN, D_OUT, SCALE, Federation, Population
from tests.toy import RANK as SMALL

N = (3, 1, 6)


@cache
def population() -> Population:
    """The toy, its bases orthonormal as they really are."""
    made, draw = Population(FedSB().family), torch.Generator().manual_seed(3)
    made.initial["layer.A"] = torch.linalg.qr(torch.randn(D_IN, SMALL, generator=draw)).Q.T.contiguous()
    made.initial["layer.B"] = torch.linalg.qr(torch.randn(D_OUT, SMALL, generator=draw)).Q.contiguous()
    return made


def full_gradient(client: str, batches: int) -> Tensor:
    """The mean gradient in the frozen weight (d_out, d_in), by autograd through the backbone itself."""
    learner, found = population()(client, 1), []
    for _, batch in zip(range(batches), learner.batches(), strict=False):
        frozen = population().backbone.clone().requires_grad_(True)
        logits = torch.tanh(batch["x"] @ frozen.T) @ learner.initial["head.weight"].T + learner.initial["head.bias"]
        loss = torch.nn.functional.cross_entropy(logits, batch["y"])
        found.append(torch.autograd.grad(loss, frozen)[0])
    return torch.stack(found).mean(0)


def after_the_start(**fields: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The server's A, B, C after a round on the toy, and G = Σ p_i G_i."""
    algorithm = FedSB(batches=2, **fields)
    first = next(Federation(algorithm, population()).run(Plan(rounds=1)))
    rows = [24 + 6 * int(client[1:]) for client in CLIENTS]
    g = sum(n / sum(rows) * full_gradient(c, 2) for n, c in zip(rows, CLIENTS, strict=True))
    server: Any = first.server
    return {**server.bases, **server.weights}, torch.as_tensor(g)


def truncated_svd(w: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


def test_the_gradient_start_is_the_best_approximation_of_the_sign_step() -> None:
    """‖ΔW − rank-r(−η sign G)‖ < 1e-3, relative; and so ΔW is not 0 at first."""
    w, g = after_the_start(start="gradient", eta=0.01)
    update = w["layer.B"] @ w["layer.C"] @ w["layer.A"]
    expected = truncated_svd(-0.01 * g.sign(), SMALL)
    assert float(expected.norm()) > 0.01
    assert float((update - expected).norm() / expected.norm()) < 1e-3


def test_the_probe_gives_the_gradient_in_the_frozen_weight_and_both_sketches() -> None:
    g, bases = SCALE * full_gradient("c1", 1), select(population().initial, only("A", "B"))
    for algorithm in (FedSB(start="gradient"), FedSB(oversample=1)):
        probe = algorithm.probe(bases)
        learner = population()("c1", 1)
        found = algorithm.cut(Gradient(probe, next(learner.batches()), only("A", "B")).alone(learner).gradient)
        if algorithm.start == "gradient":
            torch.testing.assert_close(found, {"layer.A": g})
        else:
            omega, psi = probe["layer.A"][: SMALL + 1].T, probe["layer.B"][:, SMALL + 1 :].T
            torch.testing.assert_close(found, {"layer.A": psi @ g, "layer.B": g @ omega})


def energy(server: Any, g: Tensor) -> float:
    """The share of ‖G‖² between the bases."""
    a, b = server.bases["layer.A"].double(), server.bases["layer.B"].double()
    return float((b.T @ g @ a.T).norm() ** 2 / g.norm() ** 2)


def test_a_sketch_holds_nearly_what_the_gradient_itself_would_and_random_bases_hold_little() -> None:
    """A G of MiniLM's size whose j-th singular value is 1 / j, at r = 8."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(DIM, DIM, generator=draw, dtype=torch.float64)).Q for _ in range(2))
    g = (u / torch.arange(1, DIM + 1)) @ v.T
    bases = {"layer.A": torch.linalg.qr(torch.randn(DIM, RANK, generator=draw)).Q.T.contiguous()}
    bases["layer.B"] = torch.linalg.qr(torch.randn(DIM, RANK, generator=draw)).Q
    algorithm = FedSB()
    probe, half = algorithm.probe(bases), RANK + algorithm.oversample
    omega, psi = probe["layer.A"][:half].T.double(), probe["layer.B"][:, half:].T.double()
    sent = Slopes({"layer.A": (psi @ g).float(), "layer.B": (g @ omega).float()})
    start = algorithm.server_init(bases, ())
    server = algorithm.aggregate(start, Heard({"a": Up({"layer.C": torch.zeros(RANK, RANK)}, 1, sent)}))
    best = float((1 / torch.arange(1, RANK + 1) ** 2).sum() / (1 / torch.arange(1, DIM + 1).double() ** 2).sum())
    assert energy(start, g) < 0.01
    assert 0.9 * best < energy(server, g) <= best
    for basis in (server.bases["layer.A"], server.bases["layer.B"].T):
        torch.testing.assert_close(basis @ basis.T, torch.eye(RANK))


def test_a_client_that_lost_its_bases_says_so_and_is_sent_them_again() -> None:
    federation = Federation(FedSB(), clients=("c0", "c1", "c2"))
    rounds = federation.run(Plan(rounds=5))
    next(rounds), next(rounds)
    del federation.stores["c1"]
    third, fourth = next(rounds), next(rounds)
    assert "this client's state was lost" in third.excluded["c1"]
    assert third.heard == ("c0", "c2")
    assert fourth.heard == ("c0", "c1", "c2")
    assert fourth.traffic["c1"].down_payload > fourth.traffic["c0"].down_payload


def test_sketches_of_clients_add_up_to_the_sketch_of_their_sum() -> None:
    """So the server needs sums only: two clients' replies and one with their mean give the same bases."""
    algorithm, draw = FedSB(oversample=2), torch.Generator().manual_seed(0)
    start = algorithm.server_init(population().initial, ())
    shapes = algorithm.cut(algorithm.probe(start.bases))
    one, two = ({name: torch.randn(w.shape, generator=draw) for name, w in shapes.items()} for _ in range(2))
    core = {"layer.C": torch.zeros(SMALL, SMALL)}
    apart = algorithm.aggregate(start, Heard({"a": Up(core, 1, Slopes(one)), "b": Up(core, 3, Slopes(two))}))
    both = {name: (one[name] + 3 * two[name]) / 4 for name in one}
    joint = algorithm.aggregate(start, Heard({"a": Up(core, 4, Slopes(both))}))
    torch.testing.assert_close(apart.bases, joint.bases)


def test_the_average_of_the_cores_is_the_average_of_the_updates() -> None:
    draw, algorithm = torch.Generator().manual_seed(0), FedSB(start="random", head="frozen")
    cores = [torch.randn(SMALL, SMALL, generator=draw, dtype=torch.float64) for _ in N]
    ups = {str(i): Up({"layer.C": c}, n, None) for i, (c, n) in enumerate(zip(cores, N, strict=True))}
    server = algorithm.aggregate(algorithm.server_init(population().initial, ()), Heard(ups))
    a, b = (population().initial[f"layer.{letter}"].double() for letter in "AB")
    exact = torch.stack([n / sum(N) * b @ c @ a for n, c in zip(N, cores, strict=True)]).sum(0)
    assert float(exact.norm()) > 0.5
    torch.testing.assert_close(b @ server.weights["layer.C"] @ a, exact, atol=1e-10, rtol=0)


def test_r_squared_numbers_travel_each_round_and_the_sketch_and_the_bases_once() -> None:
    """12 matrices at r = 8, d = 384: 12·8²·4 = 3,072 bytes of C; (8 + 8)·768 numbers of a sketch; 8·768 of bases."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(FedSB()))
    size, once = int(LAYERS * FedSB.info.floats(RANK, DIM, DIM) * 4), LAYERS * RANK * 2 * DIM * 4
    assert (size, once) == (3_072, 294_912)
    assert (first.up_payload, first.summary, first.down_payload) == (size, 2 * once, 0)
    assert (second.up_payload, second.summary, second.down_payload) == (size, 0, size + once)
    assert (closing.down_payload, second.head_up, second.head_down) == (size, HEAD, HEAD)


def test_the_gradient_itself_costs_2304_rounds_of_c_and_random_bases_nothing() -> None:
    assert rounds(FedSB(start="gradient"))[0].traffic["a"].summary == LAYERS * DIM * DIM * 4 == 2_304 * 3_072
    random = [rnd.traffic["a"] for rnd in rounds(FedSB(start="random"))]
    assert [t.summary for t in random] == [0, 0, 0]
    assert [t.down_payload for t in random] == [0, 3_072, 3_072]


@pytest.mark.parametrize("start", ["random", "sketch", "gradient"])
def test_before_its_first_download_a_client_predicts_with_the_frozen_backbone(start: Any) -> None:
    adapter, family = Adapter(targets=("q_proj", "v_proj"), rank=8), FedSB(start=start).family
    backbone = load(Model(backbone="random-vit", device="cpu"), adapter, Path())
    for w in modules(initial(backbone, adapter, family, 3, seed=0)).values():
        torch.testing.assert_close(w["A"] @ w["A"].T, torch.eye(8))
        torch.testing.assert_close(w["B"].T @ w["B"], torch.eye(8))
        assert not w["C"].any()
