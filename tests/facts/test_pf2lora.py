"""PF2LoRA: what it sends, its hyper-gradient and its ranks (methods.md 4; part V, 2, 7 and 11)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.pf2lora import PF2LoRA
from celora.core.adapters import Dual
from celora.core.learner import Learner
from celora.core.optim import AdamW
from celora.core.problems import Gradient
from celora.core.solve import solve
from celora.tensors import flatten
from tests.facts.payloads import HEAD, rounds
from tests.toy import RECIPE, Population

X, Y = ("layer.A", "layer.B", "head.weight", "head.bias"), ("layer.A2", "layer.B2")
RATE = 0.3


@pytest.mark.parametrize("divisor", [1, 2, 4])
def test_x_travels_and_y_does_not_whatever_its_rank(divisor: int) -> None:
    """12 matrices at r = 8 and d = 384: 12·8·(384 + 384)·4 = 294,912 bytes up and down."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(PF2LoRA(divisor=divisor)))
    assert (first.up_payload, first.down_payload) == (294_912, 0)
    assert (second.up_payload, second.down_payload) == (294_912, 294_912)
    assert (closing.up_payload, closing.down_payload) == (0, 294_912)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


# --- the hyper-gradient, part V 7 ---------------------------------------------------------------------------------


def client() -> Any:
    """c1 in float64, with 30 rows in two mini-batches, at weights that are 0 nowhere."""
    learner = Population(Dual(2), recipe=replace(RECIPE, batch_size=15, clip=0.0))("c1", 1)
    draw = torch.Generator().manual_seed(0)
    learner.initial = {n: 0.4 * torch.randn(w.shape, generator=draw).double() for n, w in learner.initial.items()}
    batches = [{"x": batch["x"].double(), "y": batch["y"]} for batch in learner.batches()]
    learner.batches = lambda size=None: iter(batches)
    return learner


def moved_by(learner: Learner, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """h of the first step, as it reaches AdamW, and y' as the second gradient is asked for."""
    found: list[Tensor] = []

    def step(self: AdamW, rows: Tensor, gradient: Tensor, rate: Tensor) -> Tensor:
        found.append(gradient[0])
        return rows

    monkeypatch.setattr(AdamW, "step", step)
    algorithm = PF2LoRA(inner_lr=RATE, **fields)
    down = algorithm.send(algorithm.server_init(learner.initial, ()), "c1")
    asked: list[Gradient] = []

    def watched(steps: Any) -> Any:
        problem = next(steps)
        while True:
            asked.append(problem)
            try:
                problem = steps.send((yield problem))
            except StopIteration as stop:
                return stop.value

    (ended,) = solve([(learner, watched(algorithm.train(learner, algorithm.client_init(learner), down)))])
    assert not isinstance(ended, Exception), ended
    return found[0], {name: asked[1].weights[name] for name in Y}


def phi(learner: Any, x: dict[str, Tensor], zeta: int) -> Tensor:
    """F(x, y − a ∇_y F(x, y; ξ); ζ), y as it starts."""
    batches = list(learner.batches())
    y = {name: learner.initial[name].clone().requires_grad_() for name in Y}
    inner = torch.autograd.grad(learner.losses({**x, **y}, batches[0]), list(y.values()))
    after = {name: w.detach() - RATE * g for (name, w), g in zip(y.items(), inner, strict=True)}
    return learner.losses({**x, **after}, batches[zeta])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("zeta", "at"), [("next", 1), ("same", 0)])
def test_the_hyper_gradient_is_that_of_finite_differences(zeta: Any, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x ↦ F(x, y − a ∇_y F(x, y; ξ); ζ), entry by entry, in float64."""
    learner = client()
    h, _ = moved_by(learner, monkeypatch, zeta=zeta)
    x = {name: learner.initial[name] for name in learner.initial if name in X}
    expected = []
    for name, weight in x.items():
        for entry in range(weight.numel()):
            nudge = torch.zeros_like(weight).view(-1)
            nudge[entry] = 1e-5
            ahead, behind = (phi(learner, {**x, name: weight + s * nudge.view_as(weight)}, at) for s in (1, -1))
            expected.append(float(ahead - behind) / 2e-5)
    assert float((h - torch.tensor(expected).double()).abs().max()) < 1e-6


def test_without_the_second_order_term_it_is_another_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = client()
    h, after = moved_by(learner, monkeypatch)
    first, same = moved_by(learner, monkeypatch, first_order=True)
    assert float((h - first).norm() / h.norm()) > 0.05
    for name in Y:
        assert torch.equal(after[name], same[name])
    weights = {name: w.clone().requires_grad_() for name, w in {**learner.initial, **after}.items()}
    of_x = torch.autograd.grad(
        learner.losses(weights, list(learner.batches())[1]), [weights[n] for n in learner.initial if n in X]
    )
    torch.testing.assert_close(first, torch.cat([g.flatten() for g in of_x]))


def test_at_the_start_where_both_ups_are_zero_the_second_order_term_is_zero_but_for_the_heads() -> None:
    """d/dA and d/dB of ∇_y F contain B and B2: harmless, and gone after a step."""
    learner = Population(Dual(2))("c1", 1)
    batch = next(iter(learner.batches()))
    algorithm = PF2LoRA()
    turn = algorithm.train(learner, algorithm.client_init(learner), algorithm.send(algorithm.server_init({}, ()), "c1"))
    lower = next(turn)
    assert lower.batch.keys() == batch.keys()
    weights = {name: w.clone().requires_grad_() for name, w in learner.initial.items()}
    inner = torch.autograd.grad(learner.losses(weights, batch), [weights[n] for n in Y], create_graph=True)
    assert not bool(inner[0].any())  # A2 meets B2 = 0
    along = [torch.ones_like(g) for g in inner]
    (of_a,) = torch.autograd.grad(
        sum((g * v).sum() for g, v in zip(inner, along, strict=True)),
        weights["layer.A"],  # type: ignore[arg-type]
    )
    assert not bool(of_a.any())


# --- ranks --------------------------------------------------------------------------------------------------------


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, atol=1e-9))


@pytest.mark.parametrize(("r", "divisor"), [(8, 2), (8, 4), (6, 1)])
def test_the_rank_of_an_update_is_within_r_minus_and_plus_the_clients(r: int, divisor: int) -> None:
    """Both ends are reached: by a D C that takes from B A, and by one beside it."""
    draw = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randn(part.rows, part.columns, generator=draw).double()
        for name, part in Dual(divisor).parts(r, 24, 20).items()
    }
    small = len(parts["A2"])
    assert small == r // divisor
    opposed = {**parts, "A2": parts["A"][:small], "B2": -parts["B"][:, :small]}
    found = []
    for w in (parts, opposed):
        a, b = Dual(divisor).lora(w)
        found.append(rank(b @ a))
        torch.testing.assert_close(b @ a, w["B"] @ w["A"] + w["B2"] @ w["A2"])
    assert found == [r + small, r - small]


def test_a_turn_prunes_nothing() -> None:
    """Both of a client's matrices keep their shapes, and after training no row of C_k or column of D_k is 0."""
    learner = Population(Dual(2))("c1", 1)
    algorithm = PF2LoRA()
    down = algorithm.send(algorithm.server_init(learner.initial, ()), "c1")
    (ended,) = solve([(learner, algorithm.train(learner, algorithm.client_init(learner), down))])
    c, d = ended.local.mine["layer.A2"], ended.local.mine["layer.B2"]  # type: ignore[union-attr]
    assert (tuple(c.shape), tuple(d.shape)) == ((2, 6), (8, 2))
    assert bool(c.norm(dim=1).all()) and bool(d.norm(dim=0).all())
    assert not torch.equal(flatten({"d": d}), torch.zeros(16))
