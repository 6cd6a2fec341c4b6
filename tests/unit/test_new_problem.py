"""A kind of problem that the package does not know: one class, asked, answered and typed like any other."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch

from celora.core.adapters import Lora
from celora.core.learner import Learner, Shared
from celora.core.problems import ClientUpdate, Features, Fit, Problem
from celora.core.solve import solve, solve_together
from celora.tensors import Tensors, but
from tests.toy import Population

CLIENTS = ("c0", "c1", "c2")


@dataclass(frozen=True)
class TrainingLoss(Problem[float]):
    """The loss of these weights on the learner's first mini-batch; together in one pass, if the batches are alike."""

    weights: Tensors
    passes: ClassVar[list[int]] = []

    def alone(self, learner: Learner) -> float:
        self.passes.append(1)
        return float(learner.losses({**learner.initial, **self.weights}, next(learner.batches())))

    @classmethod
    def together(cls, asked: Sequence[tuple[Learner, Self]], shared: Shared) -> list[float | Exception]:
        cls.passes.append(len(asked))
        many = [{**learner.initial, **problem.weights} for learner, problem in asked]
        stacks = {name: torch.stack([weights[name] for weights in many]) for name in many[0]}
        batch = shared.join([next(learner.batches()) for learner, _ in asked])
        return asked[0][0].losses(stacks, batch).tolist()


@dataclass(frozen=True)
class Twice(Problem[int]):
    """The least that a problem is: how it is answered alone."""

    number: int

    def alone(self, learner: Learner) -> int:
        if self.number < 0:
            raise ValueError(f"{self.number} < 0")
        return 2 * self.number


def learners(population: Population) -> list[Any]:
    return [population(client, 1) for client in CLIENTS]


def moved(learner: Learner, by: float) -> ClientUpdate[float]:
    loss = yield from TrainingLoss({"head.bias": learner.initial["head.bias"] + torch.tensor([by, 0.0])})
    return loss + 1


@pytest.fixture(autouse=True)
def _no_passes() -> None:
    TrainingLoss.passes.clear()


def test_a_new_kind_of_problem_is_answered_alone_and_in_one_pass_together() -> None:
    alone = solve([(it, moved(it, at)) for at, it in enumerate(learners(Population(Lora())))])
    assert TrainingLoss.passes == [1, 1, 1]
    together = solve_together([(it, moved(it, at)) for at, it in enumerate(learners(Population(Lora())))])
    assert TrainingLoss.passes == [1, 1, 1, 3]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len(set(alone)) == 3


def test_a_pass_that_fails_is_made_again_alone_so_that_only_the_culprit_fails() -> None:
    """The loss of the toy's pass is that of its first client, here the culprit."""
    torn = ZeroDivisionError("no rows")
    population = Population(Lora(), faults={("c0", 1): torn})
    failed, *others = solve_together([(it, moved(it, at)) for at, it in enumerate(learners(population))])
    assert failed is torn
    assert TrainingLoss.passes == [3, 1, 1, 1]
    assert all(isinstance(loss, float) for loss in others)


@pytest.mark.parametrize("solver", [solve, solve_together])
def test_a_problem_that_knows_no_pass_is_answered_one_by_one(solver: Any) -> None:
    def doubled(number: int) -> ClientUpdate[int]:
        return (yield from Twice(number))

    found = solver([(it, doubled(number)) for it, number in zip(learners(Population(Lora())), (1, -1, 3), strict=True)])
    assert (found[0], str(found[1]), found[2]) == (2, "-1 < 0", 6)


@pytest.mark.parametrize("solver", [solve, solve_together])
def test_problems_of_several_kinds_asked_at_the_same_time_get_their_own_answers(solver: Any) -> None:
    def first(learner: Learner) -> ClientUpdate[Any]:
        return (yield from Twice(21))

    def second(learner: Learner) -> ClientUpdate[Any]:
        return (yield from Features())

    def third(learner: Learner) -> ClientUpdate[Any]:
        return (yield from Fit({}, but()))

    one, two, three = learners(Population(Lora()))
    number, (features, _), fitted = solver([(one, first(one)), (two, second(two)), (three, third(three))])
    assert number == 42
    assert torch.equal(features, two.features()[0])
    assert fitted.metrics["steps"] == 3


SNIPPET = """
from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Features, Fit, Gradient, InputNorms, Problem, Score

class Count(Problem[int]):
    def alone(self, learner: Learner) -> int:
        return learner.examples

def train(learner: Learner) -> ClientUpdate[int]:
    fitted = yield from Fit({}, lambda name: True)
    reveal_type(fitted)
    reveal_type((yield from Gradient({}, {}, lambda name: True)))
    reveal_type((yield from Score({}, "test")))
    reveal_type((yield from Features()))
    reveal_type((yield from InputNorms(3)))
    reveal_type((yield from Count()))
    print(fitted.wieghts)
    return 0
"""


def test_mypy_infers_each_answer_and_finds_a_misspelt_attribute(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(  # torch and all else but the core is Any, which takes a second and not a minute
        "[mypy]\nfollow_imports = skip\n[mypy-celora.core.*]\nfollow_imports = silent\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "snippet.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.findall(r"Revealed type is \"(.*)\"", done.stdout) == [
        "celora.core.training.Fitted",
        "celora.core.training.GradientResult",
        "typing.Mapping[str, float]",
        "tuple[Any, Any | None]",  # of tensors
        "dict[str, Any]",
        "int",
    ], done.stdout + done.stderr
    assert re.findall(r": error: (.*)", done.stdout) == [
        '"Fitted" has no attribute "wieghts"; maybe "weights"?  [attr-defined]'
    ]
