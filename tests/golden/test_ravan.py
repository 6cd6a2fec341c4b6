"""RAVAN, one round, two clients, two heads of rank 1, by hand.

A = B = I (2 × 2), so head 1 is ΔW's first diagonal entry, s_1 C_1, and head 2 its second.

seed             C_1 = 0   S_1 = 1      C_2 =  0   S_2 = 1      head = [[1 1] [1 1]]
client a, n = 1: C_1 = 2   S_1 = 3      C_2 = -1   S_2 = 2      head = [[4 0] [0 4]]     sends 6 and -2
client b, n = 3: C_1 = 4   S_1 = 1/2    C_2 =  2   S_2 = 1      head = [[0 8] [0 0]]     sends 2 and  2

p = 1/4, 3/4     C_1 = (6 + 6)/4 = 3     C_2 = (-2 + 6)/4 = 1    head = [[1 6] [0 1]]    every scale is 1 again

Where a trains head 1 alone and b head 2 alone, C_1 = 6 and C_2 = 2: who did not train a head has no say in it.
"""

from typing import Any

import torch
from torch import Tensor

from celora.algorithms.ravan import Down, Local, Ravan, Up
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from celora.core.problems import Gradient
from celora.core.training import GradientResult
from tests.toy import RECIPE, Stub, image, turn


def one(value: float) -> Tensor:
    return torch.tensor([[float(value)]])


def weights(c1: float, s1: float, c2: float, s2: float) -> dict[str, Tensor]:
    return {"layer.C1": one(c1), "layer.C2": one(c2), "layer.S1": one(s1), "layer.S2": one(s2)}


BASES = {"layer.A": torch.eye(2), "layer.B": torch.eye(2)}
SEED = {**BASES, **weights(0, 1, 0, 1), "head.weight": torch.ones(2, 2)}
END = {
    "a": {**weights(2, 3, -1, 2), "head.weight": 4 * torch.eye(2)},
    "b": {**weights(4, 0.5, 2, 1), "head.weight": torch.tensor([[0.0, 8.0], [0.0, 0.0]])},
}
EXAMPLES = {"a": 1, "b": 3}
SENT = {"a": (6, -2), "b": (2, 2)}
CORES = {"layer.C1": one(3), "layer.C2": one(1)}
HEAD = torch.tensor([[1.0, 6.0], [0.0, 1.0]])


def one_round(head: Head) -> tuple[Ravan, Any, dict[str, Any]]:
    algorithm, ended = Ravan(heads=2, head=head), {}
    server = algorithm.server_init(SEED, ())
    for client, end in END.items():
        learner = Stub(SEED, EXAMPLES[client])
        problem, ended[client] = turn(
            algorithm, learner, algorithm.client_init(learner), algorithm.send(server, client), end
        )
        trained = {name for name in SEED if problem.train(name)}
        assert trained == set(weights(0, 0, 0, 0)) | ({"head.weight"} if head != "frozen" else set())
    return algorithm, algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def test_products_of_cores_and_scales_are_sent_and_averaged() -> None:
    algorithm, server, ended = one_round("shared")
    for client, trained in ended.items():
        c1, c2 = SENT[client]
        sent = {"layer.C1": one(c1), "layer.C2": one(c2), "head.weight": END[client]["head.weight"]}
        assert image(trained.up.weights) == image(sent)
        assert trained.local.mine == {}
        assert image(trained.model) == image({**SEED, **END[client]})
    assert image(server.weights) == image({**CORES, "head.weight": HEAD})
    assert image(algorithm.model(Local({}), algorithm.send(server, "a"))) == image(server.weights)


def test_the_next_training_starts_from_the_average_with_scales_of_one() -> None:
    algorithm, server, ended = one_round("shared")
    problem, _ = turn(algorithm, Stub(SEED), ended["b"].local, algorithm.send(server, "b"), {})
    start = {**SEED, **problem.weights}
    assert image(start) == image({**SEED, **weights(3, 1, 1, 1), "head.weight": HEAD})
    update = algorithm.family.lora({name.removeprefix("layer."): w for name, w in start.items()})
    assert (update[1] @ update[0]).tolist() == [[3.0, 0.0], [0.0, 1.0]]


def test_a_private_head_stays_and_a_frozen_one_is_nowhere() -> None:
    _, server, ended = one_round("private")
    assert image(server.weights) == image(CORES)
    assert image(ended["a"].local.mine) == image({"head.weight": END["a"]["head.weight"]})
    _, server, ended = one_round("frozen")
    assert (image(server.weights), ended["a"].local.mine) == (image(CORES), {})


def test_a_head_is_averaged_over_those_that_trained_it_and_else_stays() -> None:
    algorithm = Ravan(heads=3)
    server = algorithm.aggregate(algorithm.server_init(SEED, ()), Heard({"a": Up({"layer.C3": one(9)}, 2)}))
    ups = {"a": Up({"layer.C1": one(6)}, 1), "b": Up({"layer.C2": one(2)}, 3)}
    server = algorithm.aggregate(server, Heard(ups))
    assert image(server.weights) == image({"layer.C1": one(6), "layer.C2": one(2), "layer.C3": one(9)})


def test_by_norm_the_larger_core_is_trained_and_sent_alone() -> None:
    algorithm = Ravan(heads=2, train_heads=1, choose="norm", head="frozen")
    down = Down({"layer.C1": one(1), "layer.C2": one(-3)})
    problem, trained = turn(algorithm, Stub(SEED), Local({}), down, {"layer.C2": one(5), "layer.S2": one(2)})
    assert {name for name in SEED if problem.train(name)} == {"layer.C2", "layer.S2"}
    assert image(trained.up.weights) == image({"layer.C2": one(10)})
    assert image(trained.model) == image({**SEED, **weights(1, 1, 5, 2)})


class Sloping(Stub):
    """A stub with one mini-batch."""

    def batches(self, size: int | None = None) -> Any:
        return iter([{}])


def test_by_gradient_the_steeper_core_is_trained() -> None:
    algorithm = Ravan(heads=2, train_heads=1, choose="gradient")
    steps = algorithm.train(Sloping(SEED, 1, recipe=RECIPE), Local({}), Down({}))
    asked = next(steps)
    assert isinstance(asked, Gradient)
    assert {name for name in SEED if asked.names(name)} == {"layer.C1", "layer.C2"}
    problem = steps.send(GradientResult(1.0, {"layer.C1": one(-2), "layer.C2": one(1)}))
    assert {name for name in SEED if problem.train(name)} == {"layer.C1", "layer.S1", "head.weight"}


def test_at_first_when_all_cores_are_0_and_by_chance_any_head_may_be_drawn() -> None:
    for choose in ("random", "norm"):
        algorithm, learner = Ravan(heads=2, train_heads=1, choose=choose), Stub(SEED)
        drawn = {
            next(name for name in SEED if problem.train(name))
            for problem in (next(algorithm.train(learner, Local({}), Down({}))) for _ in range(20))
        }
        assert drawn == {"layer.C1", "layer.C2"}
