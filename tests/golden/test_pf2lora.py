"""PF2LoRA, one round, two clients, by hand.

a = 1/2, one step of AdamW at lr = 1/4, not clipped: the first moves by lr · h / (|h| + ε), a quarter against h's sign.
Seed: every entry of A and B is 1, of A2 and B2 2, of the head 3; gradients are the same in all entries of a part.

client a, n = 1, mini-batch 1, ζ the next, which is 1 again
    line 5     ∇_y F(x, y; 1)  = (A2  2, B2 -4)                    y' = (A2 2 − 1 = 1, B2 2 + 2 = 4)
    line 6     ∇ F(x, y'; 1)   = (A 1, B 1, head 1; A2 6, B2 8)    v  = (A2 6, B2 8)
               [d/dx ∇_y F]ᵀ v = (A 4, B 1, head 2)                h  = (1 − 2, 1 − 1/2, 1 − 1) = (-1, 1/2, 0)
               A <- 1 + 1/4,   B <- 1 − 1/4,   head <- 3

client b, n = 3, the same line 5, first order: h = (1, 1, 1),      A <- 3/4, B <- 3/4, head <- 11/4
server         A <- (5/4 + 9/4) / 4 = 7/8,   B <- 3/4,   head <- (3 + 33/4) / 4 = 45/16
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from celora.algorithms.pf2lora import PF2LoRA
from celora.core.aggregation import Heard
from celora.core.problems import Gradient
from celora.core.training import GradientResult
from tests.toy import RECIPE, Stub, played

RECIPE_HERE = replace(RECIPE, lr=0.25, clip=0.0)
SHAPES = {"A": (2, 3), "B": (2, 2), "A2": (1, 3), "B2": (2, 1), "head": (2, 2)}
BATCHES = tuple({"x": torch.full((1,), float(i))} for i in (1, 2))


def named(**parts: float) -> dict[str, torch.Tensor]:
    return {
        "head.weight" if part == "head" else f"layer.{part}": torch.full(SHAPES[part], float(value))
        for part, value in parts.items()
    }


SEED = named(A=1, B=1, A2=2, B2=2, head=3)
LOWER, UPPER, MIXED = named(A2=2, B2=-4), named(A=1, B=1, A2=6, B2=8, head=1), named(A=4, B=1, head=2)


def turned(algorithm: PF2LoRA, mini: Any = BATCHES[:1], examples: int = 1) -> tuple[list[Any], Any]:
    learner = Stub(SEED, examples, recipe=RECIPE_HERE, mini=mini)
    down = algorithm.send(algorithm.server_init(SEED, ()), "a")
    answers = [GradientResult(1.0, LOWER), GradientResult(1.0, UPPER), GradientResult(1.0, MIXED)]
    answers = answers[:2] if algorithm.first_order else answers
    return played(algorithm, learner, algorithm.client_init(learner), down, answers * len(mini))


def value(weights: Any, part: str) -> float:
    weight = weights["head.weight" if part == "head" else f"layer.{part}"]
    assert len(set(weight.flatten().tolist())) == 1
    return float(weight.flatten()[0])


def values(weights: Any, *parts: str) -> Any:
    return pytest.approx([value(weights, part) for part in parts], abs=1e-6)


def test_lines_5_and_6() -> None:
    (lower, upper, mixed), ended = turned(PF2LoRA(inner_lr=0.5))
    assert all(isinstance(problem, Gradient) for problem in (lower, upper, mixed))
    assert [part for part in SHAPES if lower.names(f"{part}.weight" if part == "head" else f"x.{part}")] == ["A2", "B2"]
    assert lower.along is upper.along is None
    for problem in (lower, mixed):
        assert values(problem.weights, "A2", "B2") == [2, 2]
    assert values(upper.weights, "A2", "B2") == [1, 4]
    assert values(mixed.along, "A2", "B2") == [6, 8] and len(mixed.along) == 2
    assert mixed.names("layer.A") and mixed.names("head.weight") and not mixed.names("layer.A2")
    assert values(ended.up.weights, "A", "B", "head") == [5 / 4, 3 / 4, 3]
    assert values(ended.local.mine, "A2", "B2") == [1, 4] and len(ended.local.mine) == 2
    assert values(ended.model, *SHAPES) == [5 / 4, 3 / 4, 1, 4, 3]


def test_the_server_averages_x_and_everybody_keeps_y() -> None:
    algorithm = PF2LoRA(inner_lr=0.5)
    a, b = turned(algorithm)[1], turned(PF2LoRA(inner_lr=0.5, first_order=True), examples=3)[1]
    assert values(b.up.weights, "A", "B", "head") == [3 / 4, 3 / 4, 11 / 4]
    server = algorithm.aggregate(algorithm.server_init(SEED, ()), Heard({"a": a.up, "b": b.up}))
    received = algorithm.model(a.local, algorithm.send(server, "a"))
    assert values(received, *SHAPES) == [7 / 8, 3 / 4, 1, 4, 45 / 16]


@pytest.mark.parametrize(("zeta", "order"), [("next", [1, 2, 1, 2, 1, 2]), ("same", [1, 1, 1, 2, 2, 2])])
def test_line_6_is_asked_on_the_next_mini_batch_or_on_the_same(zeta: Any, order: list[int]) -> None:
    problems, _ = turned(PF2LoRA(zeta=zeta), BATCHES)
    assert [int(problem.batch["x"]) for problem in problems] == order


def test_a_private_head_is_trained_with_x_and_stays() -> None:
    _, ended = turned(PF2LoRA(head="private", inner_lr=0.5))
    assert sorted(ended.up.weights) == ["layer.A", "layer.B"]
    assert values(ended.local.mine, "head") == [3]


def test_a_frozen_head_is_neither_asked_about_nor_kept() -> None:
    (_, upper, mixed), ended = turned(PF2LoRA(head="frozen"))
    assert not upper.names("head.weight") and not mixed.names("head.weight")
    assert sorted(ended.local.mine) == ["layer.A2", "layer.B2"]
