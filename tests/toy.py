"""What the tests need beside the toy federation of `celora.testing`, which is imported from here with the rest.

`Stub` is a learner that holds what it is given and trains nothing, for numbers worked out by hand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import linprog
from torch import Tensor

from celora.core.adapters import modules
from celora.core.algorithm import AnyAlgorithm, Trained
from celora.core.channel import Channel
from celora.core.learner import Batch, Metrics, Recipe, Split
from celora.core.problems import Fit, Gradient, Problem
from celora.core.training import Fitted, GradientResult
from celora.engines.remote import ClientFacts
from celora.rng import generator
from celora.tensors import Tensors
from celora.testing.federation import Federation, Tape, image, lost, newest, population_of, tensors_in
from celora.testing.population import CLASSES, CLIENTS, D_IN, D_OUT, RANK, RECIPE, SCALE, Population, Toy

__all__ = [
    "CLASSES", "CLIENTS", "D_IN", "D_OUT", "RANK", "RECIPE", "SCALE", "Federation", "JobContext", "Population", "Stub",
    "Tape", "Toy", "image", "least_cost", "lost", "newest", "played", "population_of", "pretend", "pretended",
    "tensors_in", "turn",
]  # fmt: skip
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Stub:
    """A learner that holds what it is given; it can be asked for anything but losses."""

    initial: Tensors
    examples: int = 1
    rows: tuple[Tensor, Tensor] = (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    recipe: Recipe = RECIPE
    mini: Sequence[Batch] = ({},)
    rng: torch.Generator = field(default_factory=lambda: generator(0, "stub"))
    device: ClassVar[torch.device] = torch.device("cpu")
    shared: ClassVar[None] = None

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """To name in a `Gradient`; nothing need be in them."""
        yield from self.mini

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        raise AssertionError("a stub does not train")

    def test(self, weights: Tensors, split: Split, rows: int | None = None) -> Metrics:
        return {"score": 0.5, "loss": 1.0, "rows": 1.0}

    def features(self) -> tuple[Tensor, Tensor]:
        return self.rows

    def input_norms(self, rows: int) -> dict[str, Tensor]:
        return {name: torch.ones(w["A"].shape[-1]) for name, w in modules(self.initial).items()}


def turn(
    algorithm: AnyAlgorithm, learner: Any, local: Any, down: Any, trained_to: Tensors
) -> tuple[Fit, Trained[Any, Any]]:
    """A client's turn whose only `Fit` is declared to end at `trained_to`: the problem posed, and what came of it."""
    steps = algorithm.train(learner, local, down)
    problem = next(steps)
    answer: object = Fitted({**learner.initial, **problem.weights, **trained_to}, {"loss": 1.0, "steps": 1.0})
    try:
        while not isinstance(following := steps.send(answer), Fit):
            answer = pretended(learner, following)
    except StopIteration as stop:
        return problem, stop.value
    raise AssertionError("a second Fit")


def played(
    algorithm: AnyAlgorithm, learner: Any, local: Any, down: Any, answers: Sequence[object]
) -> tuple[list[Problem[Any]], Trained[Any, Any]]:
    """A client's turn whose problems get these answers, one after another: the problems posed, and what came of it."""
    steps, asked = algorithm.train(learner, local, down), list[Problem[Any]]()
    try:
        asked.append(next(steps))
        for answer in answers:
            asked.append(steps.send(answer))
    except StopIteration as stop:
        assert len(asked) == len(answers)
        return asked, stop.value
    raise AssertionError(f"one more problem: {asked[-1]}")


def pretend(jobs: Sequence[Any]) -> list[Any]:
    """A `Solve` that ends every `Fit` where it starts."""
    values = []
    for learner, steps in jobs:
        try:
            problem = next(steps)
            while True:
                problem = steps.send(pretended(learner, problem))
        except StopIteration as stop:
            values.append(stop.value)
    return values


def pretended(learner: Any, problem: Problem[Any]) -> object:
    match problem:
        case Fit():
            return Fitted({**learner.initial, **problem.weights}, {"loss": 1.0, "steps": 0.0})
        case Gradient():
            weights = {**learner.initial, **problem.weights}
            return GradientResult(
                1.0, {name: torch.zeros_like(w) for name, w in weights.items() if problem.names(name)}
            )
    return problem.alone(learner)


@dataclass(frozen=True)
class JobContext:
    """A client's place in a world (`celora.site.site.JobContext`)."""

    algorithm: AnyAlgorithm
    population: Population
    client: str
    channel: Channel = ()

    @property
    def facts(self) -> ClientFacts:
        rows = {split: len(self.population.rows(self.client, split)[1]) for split in SPLITS}
        return ClientFacts(rows, b"no, yes", 0.5, "data of " + self.client, "backbone", "version")

    @property
    def initial(self) -> Tensors:
        return self.population.initial

    def learner(self, round: int) -> Toy:
        return self.population(self.client, round)

    def export(self, folder: Path, weights: Tensors) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), folder / "adapter.safetensors")


def least_cost(a: Tensor, b: Tensor, cost: Tensor) -> float:
    """Σ T · cost of a cheapest transport, by a linear program: the reference for celora.maths.transport."""
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    solved = linprog(
        cost.double().numpy().ravel(),
        A_eq=np.concatenate([rows, columns[:-1]]),  # the last column's mass follows from the others
        b_eq=np.concatenate([a.double().numpy(), b.double().numpy()[:-1]]),
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    return float(solved.fun)
