"""Local only, one round, two clients, by hand.

    seed     A = [1 2]   B = [0 0]ᵀ   head = [[1 0] [0 1]]   bias = [0 0]
    client a ends its training at A = [3 4], B = [1 0]ᵀ, head = [[2 0] [0 2]], bias = [5 6]
    client b ends its training at A = [7 8], B = [0 9]ᵀ, head and bias as drawn

a keeps [3 4], [1 0]ᵀ, its head and its bias and goes on from them; b keeps its own; the server has seen nothing.
"""

import torch

from celora.algorithms.local import Down, LocalOnly, Server, Up
from celora.core.aggregation import Heard
from celora.wire import contents, pack
from tests.toy import Stub, image, turn

SEED = {
    "layer.A": torch.tensor([[1.0, 2.0]]),
    "layer.B": torch.zeros(2, 1),
    "head.weight": torch.eye(2),
    "head.bias": torch.zeros(2),
}
END = {
    "a": {
        "layer.A": torch.tensor([[3.0, 4.0]]),
        "layer.B": torch.tensor([[1.0], [0.0]]),
        "head.weight": 2 * torch.eye(2),
        "head.bias": torch.tensor([5.0, 6.0]),
    },
    "b": {"layer.A": torch.tensor([[7.0, 8.0]]), "layer.B": torch.tensor([[0.0], [9.0]])},
}


def test_each_client_goes_on_from_its_own_end_and_the_server_learns_nothing() -> None:
    algorithm, server = LocalOnly(), Server()
    ups = {}
    for client, end in END.items():
        learner = Stub(SEED)
        start = algorithm.client_init(learner)
        problem, trained = turn(algorithm, learner, start, algorithm.send(server, client), end)
        assert image({**SEED, **problem.weights}) == image(SEED)
        assert all(map(problem.train, SEED))
        assert image(trained.local.mine) == image({**SEED, **end}) == image(trained.model)
        ups[client] = trained.up

        following, _ = turn(algorithm, learner, trained.local, algorithm.send(server, client), {})
        assert image(following.weights) == image({**SEED, **end})
        assert image(algorithm.model(trained.local, Down())) == image({**SEED, **end})
    assert image(algorithm.aggregate(server, Heard(ups))) == image(Server())


def test_nothing_that_travels_holds_a_byte_of_content() -> None:
    assert list(contents(Up())) == list(contents(Down())) == []
    assert len(pack(Up())) < 32


def test_a_frozen_head_is_neither_trained_nor_kept() -> None:
    problem, trained = turn(LocalOnly(head="frozen"), Stub(SEED), LocalOnly().client_init(Stub(SEED)), Down(), {})
    assert [name for name in SEED if problem.train(name)] == ["layer.A", "layer.B"]
    assert sorted(trained.local.mine) == ["layer.A", "layer.B"]
