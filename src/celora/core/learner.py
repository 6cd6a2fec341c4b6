"""The client's side of a local training problem: `Learner`, `Recipe`, `Fit`, `Fitted`, and `solve`.

A client's turn is a generator: `fitted = yield Fit(weights, train=...)` hands a problem to whoever runs the client.
`solve` runs the turns it is given one after another; a solver that trains K clients in one pass through the frozen
backbone has the same signature, and no turn can tell which one ran it.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from celora.fields import Count, NonNegative, Positive, setting, settings
from celora.tensors import Names, Tensors, flatten

T = TypeVar("T")

Metrics = Mapping[str, float]
Batch = Mapping[str, Tensor]
"""One mini-batch; only the learner that made it reads it."""
Split = Literal["train", "validation", "test"]


@settings
class Recipe:
    """Local training: AdamW, its state new at every `Fit` (as in FedPETuning and the published CE-LoRA code)."""

    lr: Positive = setting(1e-3, "learning rate of AdamW")
    epochs: Count = setting(1, "passes over the client's training rows in a round")
    steps: Count | None = setting(None, "mini-batches in a round; given, it replaces `epochs`")
    batch_size: Count = setting(8, "rows in a mini-batch")
    clip: NonNegative = setting(1.0, "largest norm of a gradient; 0 turns clipping off")
    weight_decay: NonNegative = setting(0.0, "decoupled weight decay; note that it pulls C to 0, not to I")
    decay: Literal["none", "linear"] = setting("none", "learning rate within a round: constant, or linear to 0")


@dataclass(frozen=True)
class Fit:
    """A local training problem.

    Attributes:
        weights: where to start; names that are missing take the learner's `initial` value.
        train: the names that are trained, the others stay as they are.
        penalty: added to the loss of every batch, from the weights being trained to a scalar (shape `()`).
    """

    weights: Tensors
    train: Names
    penalty: Callable[[Tensors], Tensor] | None = None


@dataclass(frozen=True)
class Fitted:
    """A solved problem: all weights, trained or not, detached and on the CPU; `metrics` holds loss and steps."""

    weights: dict[str, Tensor]
    metrics: Metrics


class Learner(Protocol):
    """A client's own world in one round: its rows, the shared backbone, and its draws."""

    @property
    def examples(self) -> int:
        """Number of training rows."""

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0, drawn by name from the run's seed: both sides agree on it for 0 bytes."""

    @property
    def recipe(self) -> Recipe:
        """How to train."""

    @property
    def rng(self) -> torch.Generator:
        """For the algorithm's own draws at this client in this round."""

    @property
    def device(self) -> torch.device:
        """Where training happens."""

    def batches(self) -> Iterator[Batch]:
        """The mini-batches of one `Fit`, `recipe` long, in an order drawn from the round's address."""

    def losses(self, weights: Tensors, batch: Batch) -> Tensor:
        """Mean loss of a batch: `()` for one client, `(K,)` where the weights carry a leading client axis."""

    def test(self, weights: Tensors, split: Split) -> Metrics:
        """`score` (higher is better), `loss` and `rows` on a split; without `score` and `loss` if it has no rows."""

    def features(self) -> tuple[Tensor, Tensor]:
        """Frozen-backbone features (n, d) of the training rows and their class ids (n,)."""


Turn = Generator[Fit, Fitted, T]
Job = tuple[Learner, Turn[T]]
Solve = Callable[[Sequence[Job[Any]]], list[Any]]
"""Runs turns to their ends; in place of a turn's value stands the `Exception` it raised."""


def solve(jobs: Sequence[Job[T]]) -> list[T | Exception]:
    """Run each turn to its end, one client after another."""
    return [_drive(learner, turn) for learner, turn in jobs]


def _drive(learner: Learner, turn: Turn[T]) -> T | Exception:
    try:
        problem = next(turn)
        while True:
            problem = turn.send(fit(learner, problem))
    except StopIteration as end:
        value: T = end.value
        return value
    except Exception as error:  # one client's failure is the caller's to report, not the other clients' end
        return error


def fit(learner: Learner, problem: Fit) -> Fitted:
    """Minimise the learner's loss over the trained weights, as the recipe says.

    All trained weights are views of one vector, so clipping and AdamW are a handful of operations however many
    matrices are adapted.

    Raises:
        ValueError: if nothing is to be trained.
    """
    recipe, device = learner.recipe, learner.device
    start = {name: w.to(device) for name, w in {**learner.initial, **problem.weights}.items()}
    shapes = {name: w.shape for name, w in start.items() if problem.train(name)}
    if not shapes:
        raise ValueError(f"nothing to train among {', '.join(start)}")
    vector = flatten({name: start[name] for name in shapes}).clone()
    adamw = AdamW(vector, recipe)
    batches = list(learner.batches())
    losses: list[Tensor] = []
    for step, batch in enumerate(batches):
        vector.requires_grad_(True)
        weights = {**start, **_unflatten(vector, shapes)}
        loss = learner.losses(weights, batch)
        objective = loss if problem.penalty is None else loss + problem.penalty(weights)
        (gradient,) = torch.autograd.grad(objective, vector)
        rate = recipe.lr * (1 - step / len(batches) if recipe.decay == "linear" else 1.0)
        vector = adamw.step(vector.detach(), gradient, rate)
        losses.append(loss.detach())
    loss_mean = float(torch.stack(losses).mean()) if losses else math.nan
    fitted = {**start, **_unflatten(vector, shapes)}
    metrics = {"loss": loss_mean, "steps": float(len(batches))}
    return Fitted({name: w.detach().to("cpu", copy=True) for name, w in fitted.items()}, metrics)


def _unflatten(vector: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    pieces = torch.split(vector, [shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


class AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019, algorithm 2) with gradient clipping, on one vector.

    torch's own optimiser gives the same numbers (a test holds them against each other); this one keeps the flat
    vector flat and so costs a tenth of the time on a hundred small matrices.
    """

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self, like: Tensor, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, 0
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, vector: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """The vector after one step, shape as given."""
        if self.recipe.clip:
            gradient = gradient * (self.recipe.clip / gradient.norm().clamp(min=self.recipe.clip))
        self.steps += 1
        self.first = self.first.lerp(gradient, 1 - self.beta1)
        self.second = self.second.lerp(gradient * gradient, 1 - self.beta2)
        root = (self.second / (1 - self.beta2**self.steps)).sqrt_().add_(self.eps)
        move = self.first / (1 - self.beta1**self.steps) / root
        return vector * (1 - rate * self.recipe.weight_decay) - rate * move
