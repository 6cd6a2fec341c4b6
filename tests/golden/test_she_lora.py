"""SHE-LoRA, two rounds, two clients, by hand: one module of 4 inputs and 2 outputs, rank 2, a column in 4 hidden.

round 1, lists          a, n = 1: A = [ 1  2  0  3]     b, n = 3: A = [ 0  1 -4  1]      (second rows and B are 0)
    channel norms       [1 1 1 1] at both (a stub's), so S_a = [1 2 0 3], S_b = [0 1 4 1]
    wishes              a: column 3, score 3            b: column 2, score 4
    list                both are asked for once; 4 > 3, and it is as long as a wish: column 2

round 2, weights        a: A = [ 1  0  2  0]  B = [1 0]ᵀ        b: A = [ 0  0  4  4]  B = [0 1]ᵀ
    permuted, hidden    a: A' = [ 1  0  0 | 0]                  b: A' = [ 0  0  4 | 0]      columns 0 1 3 | 2
    encrypted           a: B a_2 = [2 0]ᵀ                       b: B a_2 = [0 4]ᵀ
    p = 1/4, 3/4        P = [[1/4 0 0 | 0] [0 0 3 | 0]]         M = [1/2 3]ᵀ
    received            P + M = [[1/4 0 1/2 0] [0 0 3 3]], which is Σ p_i B_i A_i
"""

from typing import Any

import pytest
import torch

from celora.algorithms.she_lora import SHELoRA
from celora.core.aggregation import Heard
from celora.core.algorithm import Head
from celora.core.training import Fitted
from celora.privacy import ckks, keys
from tests.toy import Stub, image, pretended

SEED = {"layer.A": torch.ones(2, 4), "layer.B": torch.zeros(2, 2), "head.weight": torch.ones(2, 2)}
EXAMPLES = {"a": 1, "b": 3}


def low(a: list[float], b: list[float], head: float) -> dict[str, torch.Tensor]:
    return {
        "layer.A": torch.tensor([a, [0.0] * 4]),
        "layer.B": torch.tensor([[b[0], 0.0], [b[1], 0.0]]),
        "head.weight": torch.full((2, 2), head),
    }


FIRST = {"a": low([1, 2, 0, 3], [0, 0], 1.0), "b": low([0, 1, -4, 1], [0, 0], 1.0)}
SECOND = {"a": low([1, 0, 2, 0], [1, 0], 4.0), "b": low([0, 0, 4, 4], [0, 1], 8.0)}
HIDDEN = {"a": [1.0, 0.0, 0.0, 0.0], "b": [0.0, 0.0, 4.0, 0.0]}
ENCRYPTED = {"a": [2.0, 0.0], "b": [0.0, 4.0]}
RECEIVED = torch.tensor([[0.25, 0.0, 0.5, 0.0], [0.0, 0.0, 3.0, 3.0]])


def trained_to(algorithm: SHELoRA, learner: Stub, local: Any, down: Any, end: Any) -> Any:
    """A turn whose `Fit` ends there, and the weights it started from."""
    steps = algorithm.train(learner, local, down)
    problem: Any = next(steps)
    start, answer = {**learner.initial, **problem.weights}, Fitted({**learner.initial, **end}, {"loss": 1.0})
    try:
        while True:
            problem = steps.send(answer)
            answer = pretended(learner, problem)
    except StopIteration as stop:
        return start, stop.value


def two_rounds(head: Head) -> Any:
    algorithm = SHELoRA(head=head, budget=(0.25,))
    server = algorithm.server_init(SEED, "ab")
    locals_ = {client: algorithm.client_init(Stub(SEED)) for client in "ab"}
    told = []
    for ends in (FIRST, SECOND):
        turns = {}
        for client in "ab":
            learner = Stub(SEED, EXAMPLES[client])
            down = algorithm.send(server, client)
            turns[client] = trained_to(algorithm, learner, locals_[client], down, ends[client])
            locals_[client] = turns[client][1].local
        server = algorithm.aggregate(server, Heard({client: turn[1].up for client, turn in turns.items()}))
        told.append((server, turns))
    return algorithm, locals_, told


def test_in_round_1_nothing_of_a_model_is_sent_and_a_list_is_agreed() -> None:
    _, _, ((server, turns), _) = two_rounds("shared")
    for _, trained in turns.values():
        assert (trained.up.weights, trained.up.cipher) == (None, ())
        assert [wish.shape for wish in trained.up.wishes] == [(2, 1)]
    assert server.weights == {}
    assert [codes.tolist() for codes in server.agreed] == [turns["b"][1].up.wishes[0][0].tolist()]


def test_in_round_2_training_goes_on_where_the_client_was() -> None:
    _, _, (_, (_, turns)) = two_rounds("shared")
    for client, (start, _) in turns.items():
        assert image(start) == image(FIRST[client])


def test_what_is_sent_hides_the_column_and_encrypts_it_times_b() -> None:
    _, _, (_, (_, turns)) = two_rounds("shared")
    for client, (_, trained) in turns.items():
        assert trained.up.weights["layer.A"].tolist() == [HIDDEN[client], [0.0] * 4]
        assert image(trained.up.weights["layer.B"]) == image(SECOND[client]["layer.B"])
        numbers = ckks.decrypt(keys.SIMULATED, trained.up.cipher)
        assert numbers[:2].tolist() == pytest.approx(ENCRYPTED[client], abs=1e-6)
        assert float(numbers[2:].abs().max()) < 1e-6


def test_what_is_received_is_the_mean_of_the_updates() -> None:
    algorithm, locals_, (_, (server, _)) = two_rounds("shared")
    hidden = server.weights["layer.B"] @ server.weights["layer.A"]
    torch.testing.assert_close(hidden, torch.tensor([[0.25, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]))
    for client in "ab":
        model = algorithm.model(locals_[client], algorithm.send(server, client))
        torch.testing.assert_close(model["layer.B"] @ model["layer.A"], RECEIVED, atol=1e-6, rtol=0)
        assert model["head.weight"].tolist() == [[7.0, 7.0], [7.0, 7.0]]  # (4 + 3 · 8) / 4
        assert locals_[client].mine == {}


def test_a_private_head_is_kept_and_a_frozen_one_is_as_drawn() -> None:
    algorithm, locals_, (_, (server, turns)) = two_rounds("private")
    assert sorted(server.weights) == ["layer.A", "layer.B"]
    for client in "ab":
        assert sorted(turns[client][1].up.weights) == ["layer.A", "layer.B"]
        model = algorithm.model(locals_[client], algorithm.send(server, client))
        assert image(model["head.weight"]) == image(SECOND[client]["head.weight"])
    algorithm, locals_, (_, (server, _)) = two_rounds("frozen")
    assert sorted(algorithm.model(locals_["a"], algorithm.send(server, "a"))) == ["layer.A", "layer.B"]
