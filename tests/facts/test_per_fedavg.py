"""Per-FedAvg: what it sends, and that HF is the gradient of one step of descent (methods.md 16; part V, 2 and 11)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.per_fedavg import PerFedAvg
from celora.core.adapters import Lora
from celora.core.solve import solve
from celora.tensors import Tensors, flatten
from tests.facts.payloads import HEAD, rounds
from tests.toy import RECIPE, Population

ALPHA, BETA = 0.3, 0.2


@pytest.mark.parametrize("variant", ["FO", "HF"])
def test_bytes_are_fedits(variant: Any) -> None:
    """The adapted model does not travel."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(PerFedAvg(variant=variant)))
    assert (first.up_payload, first.down_payload) == (294_912, 0)
    assert (second.up_payload, second.down_payload) == (294_912, 294_912)
    assert (closing.up_payload, closing.down_payload) == (0, 294_912)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def client(**recipe: Any) -> Any:
    """c1 in float64, with 30 rows in two mini-batches, at a B that is not 0."""
    learner = Population(Lora(), recipe=replace(RECIPE, batch_size=15, **recipe))("c1", 1)
    learner.initial = {name: w.double() for name, w in learner.initial.items()}
    learner.initial["layer.B"] = 0.2 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
    batches = [{"x": batch["x"].double(), "y": batch["y"]} for batch in learner.batches()]
    learner.batches = lambda size=None: iter(batches)
    return learner


def trained(learner: Any, **fields: Any) -> Any:
    algorithm = PerFedAvg(alpha=ALPHA, beta=BETA, **fields)
    down = algorithm.send(algorithm.server_init(learner.initial, ()), "c1")
    (ended,) = solve([(learner, algorithm.train(learner, algorithm.client_init(learner), down))])
    return ended


def through(learner: Any) -> Tensor:
    """∇ of w ↦ f(w − α ∇f(w; D1); D2), by autograd."""
    first, second = learner.batches()
    w = {name: t.clone().requires_grad_() for name, t in learner.initial.items()}
    inner = torch.autograd.grad(learner.losses(w, first), list(w.values()), create_graph=True)
    adapted = {name: t - ALPHA * g for (name, t), g in zip(w.items(), inner, strict=True)}
    return flatten(dict(enumerate(torch.autograd.grad(learner.losses(adapted, second), list(w.values())))))  # type: ignore[arg-type]


def step(learner: Any, weights: Tensors) -> Tensor:
    """What w was moved along."""
    return flatten({name: (learner.initial[name] - w) / BETA for name, w in weights.items()})


def test_hessian_free_is_the_gradient_through_the_step_and_first_order_is_not() -> None:
    learner = client(clip=0.0)
    exact = through(learner)
    coarse, fine, finest = (
        float((step(learner, trained(learner, variant="HF", delta=delta).up.weights) - exact).norm() / exact.norm())
        for delta in (1e-2, 1e-3, 1e-4)
    )
    assert fine < coarse / 50  # central differences: an error of δ²
    assert finest < 1e-6
    assert float((step(learner, trained(learner).up.weights) - exact).norm() / exact.norm()) > 0.05


def test_what_predicts_is_one_step_from_what_was_received_and_not_from_what_is_sent() -> None:
    learner = client(clip=0.0)
    ended, (batch, _) = trained(learner), list(learner.batches())
    w = {name: t.clone().requires_grad_() for name, t in learner.initial.items()}
    slopes = torch.autograd.grad(learner.losses(w, batch), list(w.values()))
    for (name, at), gradient_at in zip(w.items(), slopes, strict=True):
        torch.testing.assert_close(ended.model[name], at.detach() - ALPHA * gradient_at)
    assert not torch.equal(ended.model["layer.B"], ended.up.weights["layer.B"])


def test_each_step_is_as_long_as_the_recipes_clip_allows() -> None:
    learner = client(clip=0.01)
    assert float(step(learner, trained(learner).up.weights).norm()) == pytest.approx(0.01)


def test_adapting_helps_a_client_more_than_training_a_start_does() -> None:
    """On its own rows: f(adapted) < f(received)."""
    learner = client()
    ended = trained(learner, adapt=5)
    rows = {"x": torch.cat([b["x"] for b in learner.batches()]), "y": torch.cat([b["y"] for b in learner.batches()])}
    assert float(learner.losses(ended.model, rows)) < float(learner.losses(learner.initial, rows))
