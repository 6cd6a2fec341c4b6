"""RoLoRA, two turns, two clients, by hand.

seed             A = [1 1]    B = [0 0]ᵀ    head = [[1 1] [1 1]]

turn 1, B
client a, n = 1: B = [4 0]ᵀ   head = [[4 0] [0 4]]
client b, n = 3: B = [0 8]ᵀ   head = [[0 8] [0 0]]
p = 1/4, 3/4     B = [4/4  24/4]ᵀ = [1 6]ᵀ,   head = [[1 6] [0 1]],   B A = [[1 1] [6 6]]

turn 2, A, over B = [1 6]ᵀ
client a, n = 1: A = [5 1]
client b, n = 3: A = [1 -3]
                 A = [(5 + 3)/4  (1 - 9)/4] = [2 -2],                 B A = [[2 -2] [12 -12]]

which is the average of the two updates, 1/4 [[5 1] [30 6]] + 3/4 [[1 -3] [6 -18]]. Down, a client that was heard in
turn 1 is sent B alone, in turn 2 A alone; c, which was away, is sent both.
"""

from typing import Any

import torch

from celora.algorithms.rolora import RoLoRA, Up
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from tests.toy import Stub, image, turn

SEED = {"layer.A": torch.ones(1, 2), "layer.B": torch.zeros(2, 1), "head.weight": torch.ones(2, 2)}
HEADS = {"a": 4 * torch.eye(2), "b": torch.tensor([[0.0, 8.0], [0.0, 0.0]])}
FIRST = {"a": torch.tensor([[4.0], [0.0]]), "b": torch.tensor([[0.0], [8.0]])}
SECOND = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([[1.0, -3.0]])}
EXAMPLES = {"a": 1, "b": 3}
B, A = torch.tensor([[1.0], [6.0]]), torch.tensor([[2.0, -2.0]])
HEAD = torch.tensor([[1.0, 6.0], [0.0, 1.0]])


def one_turn(
    algorithm: RoLoRA, server: Any, locals_: dict[str, Any], half: str, ends: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, Any]]:
    ended = {}
    for client, end in ends.items():
        learner, down = Stub(SEED, EXAMPLES[client]), algorithm.send(server, client)
        local = locals_.get(client, algorithm.client_init(learner))
        weights = {f"layer.{half}": end, "head.weight": HEADS[client]}
        weights = weights if algorithm.head != "frozen" else {f"layer.{half}": end}
        problem, ended[client] = turn(algorithm, learner, local, down, weights)
        assert [name for name in ("layer.A", "layer.B") if problem.train(name)] == [f"layer.{half}"]
        assert problem.train("head.weight") == (algorithm.head != "frozen")
    return algorithm.aggregate(server, Heard({c: trained.up for c, trained in ended.items()})), ended


def two_turns(head: Head) -> tuple[RoLoRA, list[Any], list[dict[str, Any]]]:
    algorithm = RoLoRA(head=head)
    first, ended = one_turn(algorithm, algorithm.server_init(SEED, ()), {}, "B", FIRST)
    second, again = one_turn(algorithm, first, {c: trained.local for c, trained in ended.items()}, "A", SECOND)
    return algorithm, [first, second], [ended, again]


def test_b_is_averaged_then_a_and_a_shared_head_with_both() -> None:
    _, (first, second), (ended, again) = two_turns("shared")
    assert image(first.weights) == image({"layer.B": B, "head.weight": HEAD})
    assert image(second.weights) == image({"layer.A": A, "layer.B": B, "head.weight": HEAD})
    for client, n in EXAMPLES.items():
        assert image(ended[client].up) == image(Up({"layer.B": FIRST[client], "head.weight": HEADS[client]}, n))
        assert sorted(again[client].up.weights) == ["head.weight", "layer.A"]
        assert again[client].local.mine == {}


def test_the_served_update_is_the_average_of_the_updates() -> None:
    algorithm, (_, second), (_, again) = two_turns("shared")
    model = algorithm.model(again["a"].local, algorithm.send(second, "a"))
    assert (model["layer.B"] @ model["layer.A"]).tolist() == [[2.0, -2.0], [12.0, -12.0]]


def test_who_was_heard_is_sent_the_half_that_moved_and_who_was_away_both() -> None:
    algorithm, (first, second), (ended, again) = two_turns("private")
    assert image(algorithm.send(first, "a").weights) == image({"layer.B": B})
    assert image(algorithm.send(second, "a").weights) == image({"layer.A": A})
    assert image(algorithm.send(second, "c").weights) == image({"layer.A": A, "layer.B": B})
    for client, half in (("a", second), ("c", second)):
        local = again[client].local if client in again else algorithm.client_init(Stub(SEED))
        received = algorithm.model(local, algorithm.send(half, client))
        assert (received["layer.B"] @ received["layer.A"]).tolist() == [[2.0, -2.0], [12.0, -12.0]]
    assert image(ended["b"].local.mine) == image({"head.weight": HEADS["b"]})


def test_the_next_training_starts_from_the_averages() -> None:
    algorithm, (_, second), (_, again) = two_turns("private")
    down = algorithm.send(second, "b")
    problem, _ = turn(algorithm, Stub(SEED), again["b"].local, down, {})
    assert down.half == "B"
    assert image(dict(sorted(problem.weights.items()))) == image(
        {"head.weight": HEADS["b"], "layer.A": A, "layer.B": B}
    )


def test_of_a_frozen_head_nothing_is_kept_or_sent() -> None:
    _, (_, second), (_, again) = two_turns("frozen")
    assert sorted(second.weights) == ["layer.A", "layer.B"]
    assert all(not trained.local.mine and list(trained.up.weights) == ["layer.A"] for trained in again.values())
