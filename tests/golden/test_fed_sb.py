"""Fed-SB, its start and one round, two clients, by hand.

start = "gradient", η = 1/2, r = 1, n = 1 and 3:

    G_a = [[4 -4] [8 4]]    G_b = [[0 2] [-2 0]]     G = (G_a + 3 G_b)/4 = [[1 1/2] [1/2 1]]
    −η sign(G) = [[-1/2 -1/2] [-1/2 -1/2]] = U S Vᵀ, of rank 1, S = 1

Unweighted it would be another: (G_a + G_b)/2 has a negative entry.

start = "sketch", r = 1, p = 0:

    Y_a = [ 0 16]ᵀ   Y_b = [4 0]ᵀ    Y = [3 4]ᵀ       U  = ±[3 4]ᵀ/5
    Z_a = [-8  0]    Z_b = [0 1]     Z = [-2 3/4]     Vᵀ = ±[-8 3]/√73        C = 0

The round after: C_a = 5 and C_b = 1 give C = (5 + 3)/4 = 2.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from celora.algorithms.fed_sb import Down, FedSB, Local, Slopes, Up
from celora.core.aggregation import Heard
from celora.core.algorithm import Head, Trained
from celora.core.problems import Fit, Gradient
from celora.core.training import Fitted, GradientResult
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.tensor([[0.0, 1.0]]),
    "layer.B": torch.tensor([[1.0], [0.0]]),
    "layer.C": torch.zeros(1, 1),
    "head.weight": torch.ones(2, 2),
}
HEADS = {"a": 4 * torch.eye(2), "b": torch.tensor([[0.0, 8.0], [0.0, 0.0]])}
HEAD = torch.tensor([[1.0, 6.0], [0.0, 1.0]])
EXAMPLES = {"a": 1, "b": 3}
G = {"a": [[4.0, -4.0], [8.0, 4.0]], "b": [[0.0, 2.0], [-2.0, 0.0]]}
Y = {"a": [[0.0], [16.0]], "b": [[4.0], [0.0]]}
Z = {"a": [[-8.0, 0.0]], "b": [[0.0, 1.0]]}


def core(value: float) -> Tensor:
    return torch.tensor([[float(value)]])


class Two(Stub):
    """A stub with two mini-batches, of more."""

    def batches(self, size: int | None = None) -> Any:
        return iter([{}, {}, {}])


def gradients(algorithm: FedSB, client: str) -> list[dict[str, Tensor]]:
    """Of two mini-batches, at the probe: their mean is what the table says; what is not sent of them is 99."""
    if algorithm.start == "gradient":
        mean = {"layer.A": torch.tensor(G[client])}
    else:
        mean = {
            "layer.A": torch.cat([torch.full((1, 2), 99.0), torch.tensor(Z[client])]),
            "layer.B": torch.cat([torch.tensor(Y[client]), torch.full((2, 1), 99.0)], dim=1),
        }
    return [{name: f * w for name, w in mean.items()} for f in (0.5, 1.5)]


def started(algorithm: FedSB, client: str) -> Trained[Local, Up]:
    """A client's first turn."""
    learner = Two(SEED, EXAMPLES[client])
    steps = algorithm.train(learner, algorithm.client_init(learner), Down({}, {}, introduce=True))
    problem = next(steps)
    try:
        for gradient in gradients(algorithm, client):
            assert isinstance(problem, Gradient)
            assert set(gradient) == {name for name in SEED if problem.names(name)}
            b, c, a = (problem.weights[f"layer.{letter}"] for letter in "BCA")
            assert not (b @ c @ a).any()
            problem = steps.send(GradientResult(1.0, gradient))
        assert isinstance(problem, Fit)
        assert algorithm.head != "frozen"
        assert [name for name in SEED if problem.train(name)] == ["head.weight"]
        steps.send(Fitted({**SEED, "head.weight": HEADS[client]}, {}))
    except StopIteration as stop:
        return stop.value
    raise AssertionError("one problem too many")


def first_round(algorithm: FedSB) -> tuple[Any, dict[str, Trained[Local, Up]]]:
    server = algorithm.server_init(SEED, ())
    assert image(algorithm.send(server, "a")) == image(Down({}, {}, introduce=True))
    ended = {client: started(algorithm, client) for client in EXAMPLES}
    return algorithm.aggregate(server, Heard({client: trained.up for client, trained in ended.items()})), ended


def gradient_start(head: Head = "frozen") -> FedSB:
    return FedSB(start="gradient", eta=0.5, batches=2, head=head)


def test_gradients_are_averaged_by_rows_and_c_starts_at_the_sign_step() -> None:
    server, ended = first_round(gradient_start())
    assert image(ended["a"].up) == image(Up({"layer.C": core(0)}, 1, Slopes({"layer.A": torch.tensor(G["a"])})))
    assert server.weights["layer.C"].item() == pytest.approx(1)
    update = server.bases["layer.B"] @ server.weights["layer.C"] @ server.bases["layer.A"]
    torch.testing.assert_close(update, torch.full((2, 2), -0.5))


def test_sketches_are_averaged_and_their_directions_are_the_bases() -> None:
    server, ended = first_round(FedSB(oversample=0, batches=2, head="frozen"))
    sent = Slopes({"layer.A": torch.tensor(Z["b"]), "layer.B": torch.tensor(Y["b"])})
    assert image(ended["b"].up) == image(Up({"layer.C": core(0)}, 3, sent))
    assert server.weights["layer.C"].item() == 0
    b, a = server.bases["layer.B"].flatten(), server.bases["layer.A"].flatten()
    torch.testing.assert_close(b * b.sign()[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(a * a.sign()[1], torch.tensor([-8.0, 3.0]) / 73**0.5)


def test_in_the_first_round_only_the_head_is_trained() -> None:
    server, ended = first_round(gradient_start("shared"))
    assert image(server.weights["head.weight"]) == image(HEAD)
    assert ended["a"].local.mine == {}
    server, ended = first_round(gradient_start("private"))
    assert "head.weight" not in server.weights
    assert image(ended["a"].local.mine) == image({"head.weight": HEADS["a"]})


def test_bases_come_down_once_and_then_cores_alone_travel() -> None:
    algorithm = gradient_start("private")
    server, ended = first_round(algorithm)
    down = algorithm.send(server, "a")
    assert image(down) == image(Down(server.weights, server.bases, introduce=False))
    received = algorithm.model(ended["a"].local, down)
    assert image(received) == image({**server.bases, **server.weights, "head.weight": HEADS["a"]})

    ups = {}
    for client, value in (("a", 5), ("b", 1)):
        learner = Stub(SEED, EXAMPLES[client])
        problem, trained = turn(algorithm, learner, ended[client].local, down, {"layer.C": core(value)})
        assert [name for name in SEED if problem.train(name)] == ["layer.C", "head.weight"]
        assert image(problem.weights) == image({**SEED, **received, "head.weight": HEADS[client]})
        assert image(trained.up) == image(Up({"layer.C": core(value)}, EXAMPLES[client], None))
        assert image(trained.local.bases) == image(server.bases)
        ups[client] = trained.up
    later = algorithm.aggregate(server, Heard(ups))
    assert image(later.weights) == image({"layer.C": core(2)})
    assert image(algorithm.send(later, "a")) == image(Down({"layer.C": core(2)}, {}, introduce=False))
    assert image(algorithm.send(later, "newcomer").bases) == image(server.bases)
    assert image(algorithm.model(trained.local, algorithm.send(later, "b"))["layer.B"]) == image(
        server.bases["layer.B"]
    )


def test_a_random_start_asks_for_nothing() -> None:
    algorithm = FedSB(start="random")
    server = algorithm.server_init(SEED, ())
    assert image(algorithm.send(server, "a")) == image(Down({}, {}, introduce=False))
    end = {"layer.C": core(5), "head.weight": HEADS["a"]}
    _, trained = turn(algorithm, Stub(SEED), Local({}, {}), algorithm.send(server, "a"), end)
    server = algorithm.aggregate(
        server, Heard({"a": trained.up, "b": Up({"layer.C": core(1), "head.weight": HEADS["b"]}, 3, None)})
    )
    assert image(server.weights) == image({"layer.C": core(2), "head.weight": HEAD})
    assert image(algorithm.send(server, "b").bases) == image({})


def test_a_gradient_of_another_shape_costs_its_sender_its_say_and_nobody_else() -> None:
    algorithm = gradient_start()
    server = algorithm.server_init(SEED, ())
    odd = Up({"layer.C": core(0)}, 1, Slopes({"layer.A": torch.ones(3, 2)}))
    nothing = Up({"layer.C": core(0)}, 1, None)
    waiting = algorithm.aggregate(server, Heard({"a": odd, "b": nothing}))
    assert algorithm.send(waiting, "a").introduce
    good = started(algorithm, "b").up
    one, two = (algorithm.aggregate(waiting, Heard(ups)) for ups in ({"b": good}, {"a": odd, "b": good}))
    assert image(one) == image(two)
    assert not algorithm.send(one, "a").introduce
