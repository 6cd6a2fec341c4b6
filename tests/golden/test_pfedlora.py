"""pFedLoRA, one round, two clients, by hand. Client b's own model has a layer that a's has not.

seed             A = [1 1]    B = [0 0]ᵀ   head = [[1 1] [1 1]]          (b besides: own.w = [7])
client a, n = 1: after phase 1   head = [[2 0] [0 2]]                 after phase 2   A = [2 1]    B = [1 0]ᵀ
client b, n = 3: after phase 1   head = [[3 3] [3 3]], own.w = [9]    after phase 2   A = [6 1]    B = [1 4]ᵀ

p = 1/4, 3/4     A = [(2 + 18)/4  (1 + 3)/4] = [5 1],   B = [(1 + 3)/4  (0 + 12)/4]ᵀ = [1 3]ᵀ

μ = 1/4, losses of one number, loss(w) = B₀ + 10:   of losses  ¾·10 + ¼·(B₀ + 10) = 10 + B₀/4,   of logits  B₀/4 + 10
"""

from typing import Any

import torch

from celora.algorithms.pfedlora import PFedLoRA
from celora.core.aggregation import Heard
from celora.core.training import Fitted
from tests.toy import Stub, image

SEED = {"fc.A": torch.ones(1, 2), "fc.B": torch.zeros(2, 1), "head.weight": torch.ones(2, 2)}
OWN = {"a": {}, "b": {"own.w": torch.tensor([[7.0]])}}
FIRST = {
    "a": {"head.weight": 2 * torch.eye(2)},
    "b": {"head.weight": torch.full((2, 2), 3.0), "own.w": torch.tensor([[9.0]])},
}
SECOND = {
    "a": {"fc.A": torch.tensor([[2.0, 1.0]]), "fc.B": torch.tensor([[1.0], [0.0]])},
    "b": {"fc.A": torch.tensor([[6.0, 1.0]]), "fc.B": torch.tensor([[1.0], [4.0]])},
}
ADAPTER = {"fc.A": torch.tensor([[5.0, 1.0]]), "fc.B": torch.tensor([[1.0], [3.0]])}


def phases(algorithm: PFedLoRA, client: str, local: Any, down: Any) -> Any:
    """A turn whose two `Fit`s end as the docstring says: the problems posed, and what came of them."""
    learner = Stub({**SEED, **OWN[client]}, {"a": 1, "b": 3}[client])
    steps, posed = algorithm.train(learner, local, down), []
    answer: object = None
    for end in (FIRST[client], SECOND[client]):
        problem = next(steps) if answer is None else steps.send(answer)
        posed.append(problem)
        answer = Fitted({**problem.weights, **end}, {"loss": 1.0, "steps": 1.0})
    try:
        steps.send(answer)
    except StopIteration as stop:
        return posed, stop.value
    raise AssertionError("a third Fit")


def one_round() -> tuple[PFedLoRA, Any, dict[str, Any], dict[str, Any]]:
    algorithm, posed, ended = PFedLoRA(mu=0.25), {}, {}
    server = algorithm.server_init(SEED, ("a", "b"))
    for client in "ab":
        local = algorithm.client_init(Stub(SEED))
        posed[client], ended[client] = phases(algorithm, client, local, algorithm.send(server, client))
    return algorithm, algorithm.aggregate(server, Heard({c: t.up for c, t in ended.items()})), posed, ended


def test_first_the_own_model_is_trained_and_then_the_adapter_beside_it() -> None:
    _, _, posed, _ = one_round()
    for client, (first, second) in posed.items():
        names = {*SEED, *OWN[client]}
        assert {name for name in names if first.train(name)} == names - {"fc.A", "fc.B"}
        assert {name for name in names if second.train(name)} == {"fc.A", "fc.B"}
        assert image(second.weights) == image({**SEED, **OWN[client], **FIRST[client]})


def test_adapters_are_averaged_by_rows_and_own_models_stay() -> None:
    algorithm, server, _, ended = one_round()
    assert image(server.adapter) == image(ADAPTER)
    for client, trained in ended.items():
        assert image(trained.up.adapter) == image(SECOND[client])
        assert image(trained.local.own) == image(FIRST[client])
        assert image(trained.model) == image({**FIRST[client], **SECOND[client]})
        assert image(algorithm.model(trained.local, algorithm.send(server, client))) == image(
            {**FIRST[client], **ADAPTER}
        )


def test_mu_mixes_losses_or_logits() -> None:
    def losses(weights: Any) -> torch.Tensor:
        return weights["fc.B"][0, 0] + 10

    of_losses, of_logits = PFedLoRA(mu=0.25), PFedLoRA(mu=0.25, mix="logit")
    for b in (0.0, 8.0):
        weights = {**SEED, "fc.B": torch.full((2, 1), b)}
        assert float(of_losses.mixed(losses, weights)) == 10 + b / 4
        assert float(of_logits.mixed(losses, weights)) == b / 4 + 10
    assert image(of_logits.model(of_logits.client_init(Stub(SEED)), of_logits.send(one_round()[1], "a"))) == image(
        {**ADAPTER, "fc.B": ADAPTER["fc.B"] / 4}
    )
