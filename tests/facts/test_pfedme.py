"""pFedMe: what it sends, and that its steps are those of the Moreau envelope (methods.md 16; part V, 2 and 11)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from celora.algorithms.fedit import FedIT
from celora.algorithms.pfedme import PFedMe, Up
from celora.core.adapters import Lora
from celora.core.aggregation import Heard
from celora.core.client_state import KeptModel, unpacked
from celora.core.messages import Plan
from celora.core.solve import solve
from celora.tensors import flatten
from tests.facts.payloads import HEAD, rounds
from tests.toy import CLIENTS, RECIPE, Federation, Population, image

ONE_BATCH = replace(RECIPE, batch_size=1000, clip=0.0)


def test_bytes_are_fedits() -> None:
    """12 matrices at r = 8 and d = 384: 12·8·(384 + 384)·4 = 294,912 bytes up and down."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(PFedMe()))
    assert (first.up_payload, first.down_payload) == (294_912, 0)
    assert (second.up_payload, second.down_payload) == (294_912, 294_912)
    assert (closing.up_payload, closing.down_payload) == (0, 294_912)
    assert (second.head_up, second.head_down) == (HEAD, HEAD)


def trained(**fields: Any) -> tuple[Any, Any]:
    """One turn of c1 with all its rows in one mini-batch, and its learner."""
    learner, algorithm = Population(Lora(), recipe=ONE_BATCH)("c1", 1), PFedMe(**fields)
    down = algorithm.send(algorithm.server_init(learner.initial, CLIENTS), "c1")
    ((ended),) = solve([(learner, algorithm.train(learner, algorithm.client_init(learner), down))])
    return ended, learner


def test_after_many_steps_theta_minimises_the_loss_and_its_distance() -> None:
    """∇f(θ) + λ (θ − w) = 0: so ηλ(w − θ) = η ∇f(θ), the gradient of the envelope; w moves along it."""
    ended, learner = trained(lam=2.0, inner_steps=500, inner_lr=0.1, eta=0.25)
    theta = {name: ended.model[name].clone().requires_grad_() for name in learner.initial}
    batch = next(iter(Population(Lora(), recipe=ONE_BATCH)("c1", 1).batches()))
    slopes = torch.autograd.grad(learner.losses(theta, batch), list(theta.values()))
    for (name, at), gradient_at in zip(theta.items(), slopes, strict=True):
        start = learner.initial[name]
        torch.testing.assert_close(gradient_at, -2.0 * (at.detach() - start), atol=1e-5, rtol=0)
        torch.testing.assert_close(ended.up.weights[name], start - 0.25 * gradient_at, atol=1e-5, rtol=0)


def test_at_eta_lambda_1_what_is_sent_is_theta() -> None:
    ended, learner = trained(lam=2.0, eta=0.5)
    for name, weight in ended.up.weights.items():
        torch.testing.assert_close(weight, ended.model[name])
        assert not torch.equal(weight, learner.initial[name]) or name == "layer.A"


def test_a_large_lambda_holds_theta_at_w() -> None:
    far = []
    for lam in (0.1, 1.0, 8.0):
        ended, learner = trained(lam=lam, inner_steps=50, eta=0.1)
        far.append(float((flatten(ended.model) - flatten(learner.initial)).norm()))
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.25 * far[0]


def factors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"layer.A": torch.randn(4, 6, generator=draw), "layer.B": torch.randn(8, 4, generator=draw)}


def test_at_beta_1_the_server_is_fedits() -> None:
    start, clients = factors(9), {str(seed): Up(factors(seed), seed + 1) for seed in range(3)}
    ours, its = PFedMe(beta=1.0), FedIT()
    expected = its.aggregate(its.server_init(start, ()), Heard(clients))  # type: ignore[arg-type]
    assert image(ours.aggregate(ours.server_init(start, ()), Heard(clients)).weights) == image(expected.weights)


def test_the_personal_model_starts_anew_from_w_in_every_turn() -> None:
    """Nothing of θ is kept: a client's private state is its private head, or nothing."""
    federation = Federation(PFedMe())
    list(federation.run(Plan(rounds=2)))
    for store in federation.stores.values():
        assert federation.private(store).mine == {}
        assert "personal@2" in store and unpacked(KeptModel, store["personal@2"], federation.schema).weights
