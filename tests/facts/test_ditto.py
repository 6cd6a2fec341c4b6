"""Ditto: what it sends, that its global model is FedIT's, and what λ does (methods.md 16; part V, 2 and 11)."""

import pytest
import torch

from celora.algorithms.ditto import Ditto
from celora.algorithms.fedit import FedIT
from celora.core.client_state import KeptModel, unpacked
from celora.core.messages import Plan
from celora.tensors import flatten
from tests.facts.payloads import HEAD, rounds
from tests.toy import CLIENTS, Federation, image

PLAN = Plan(rounds=2)


def test_bytes_are_fedits_whatever_the_personal_model() -> None:
    """12 matrices at r = 8 and d = 384: 12·8·(384 + 384)·4 = 294,912 bytes up and down."""
    first, second, closing = (rnd.traffic["a"] for rnd in rounds(Ditto()))
    assert [first, second, closing] == [rnd.traffic["a"] for rnd in rounds(FedIT())]
    assert (second.up_payload, second.down_payload, second.head_up) == (294_912, 294_912, HEAD)


def run(**fields: object) -> Federation:
    federation = Federation(Ditto(**fields))
    federation.server = list(federation.run(PLAN))[-1].server  # type: ignore[attr-defined]
    return federation


def personal(federation: Federation, client: str) -> torch.Tensor:
    weights = unpacked(KeptModel, federation.stores[client]["personal@2"], federation.schema).weights
    return flatten({name: weights[name] for name in federation.population.initial})


class Fits(FedIT):
    """FedIT, which fits once more in its turn, for the same draws of mini-batches."""

    def train(self, learner, local, down):  # type: ignore[no-untyped-def]
        trained = yield from FedIT.train(self, learner, local, down)
        list(learner.batches())
        return trained


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_personal_models_do_not_touch_the_global_one(lam: float) -> None:
    expected = list(Federation(Fits()).run(PLAN))[-1].server
    assert image(run(lam=lam).server.weights) == image(expected.weights)  # type: ignore[attr-defined]


def test_lambda_leads_from_local_training_to_the_global_model() -> None:
    """‖v_i − w‖, w being what was received in the last round, falls with λ, down to what AdamW's last steps leave."""
    far = []
    for lam in (0.0, 0.1, 1.0, 10.0):
        federation = run(lam=lam)
        gaps = []
        for client in CLIENTS:
            w = unpacked(KeptModel, federation.stores[client]["received@2"], federation.schema).weights
            w = flatten({name: w[name] for name in federation.population.initial})
            gaps.append(float((personal(federation, client) - w).norm()))
        far.append(sum(gaps))
    assert far == sorted(far, reverse=True), far
    assert far[-1] < 0.5 * far[0]


def test_without_lambda_the_personal_model_is_that_of_a_client_alone() -> None:
    """It learns nothing from the others: the same with one client as with four."""
    alone = Federation(Ditto(lam=0.0), clients=("c1",))
    list(alone.run(PLAN))
    assert torch.equal(personal(alone, "c1"), personal(run(lam=0.0), "c1"))
