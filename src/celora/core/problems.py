"""What a client's update may ask for. A problem says how it is answered, for one client and for many in one pass.

A client's update is a generator of problems: `fitted = yield from Fit(weights, train=...)` hands one to whoever runs
the client (`celora.core.solve`) and evaluates to its answer, of the type that the problem's class names. No update can
tell whether it was answered alone or together with those of other clients.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Self, TypeVar

from celora.core.learner import Batch, Learner, Losses, Metrics, Shared, Split
from celora.core.training import Fitted, GradientResult, Prepared, caught, gradients, minimise, stacked
from celora.lazy import Tensor
from celora.tensors import Names, Tensors

A = TypeVar("A")
T = TypeVar("T")


class Problem(ABC, Generic[A]):
    """Something that a learner can be asked, with an answer of type A. A new kind of problem is a new subclass."""

    def __iter__(self) -> Generator["Problem[Any]", Any, A]:
        """Ask: `answer = yield from problem`."""
        answer: A = yield self
        return answer

    @abstractmethod
    def alone(self, learner: Learner) -> A:
        """This learner's answer."""

    @classmethod
    def together(cls, asked: Sequence[tuple[Learner, Self]], shared: Shared) -> list[A | Exception]:
        """Answers to problems of this kind by learners whose `shared` is this one, in as few passes as pay.

        By default they are answered one by one. In place of an answer stands the exception that it ended in; whatever
        this method raises itself makes all of them be answered alone, so that only the culprit fails.
        """
        return [caught(partial(problem.alone, learner)) for learner, problem in asked]


ClientUpdate = Generator[Problem[Any], Any, T]
"""The generator of a local update: it asks for problems and returns a T."""


@dataclass(frozen=True)
class Fit(Problem[Fitted]):
    """A local training problem: minimise the learner's loss over the trained weights, as its recipe says.

    Attributes:
        weights: where to start; names that are missing take the learner's `initial` value.
        train: the names that are trained, the others stay as they are.
        penalty: added to the loss of every batch, from the weights being trained to a scalar (shape `()`).
        objective: what is minimised instead of `losses(weights)`, made of losses under weights that may differ: for
            models in two parts. It must be the same for all clients: a method, not a closure over a client's state.
    """

    weights: Tensors
    train: Names
    penalty: Callable[[Tensors], Tensor] | None = None
    objective: Callable[[Losses, Tensors], Tensor] | None = None

    def alone(self, learner: Learner) -> Fitted:
        """The solution.

        Raises:
            ValueError: if nothing is to be trained.
        """
        return minimise([self._prepared(learner)], whole=True)[0]

    @classmethod
    def together(cls, asked: Sequence[tuple[Learner, Self]], shared: Shared) -> list[Fitted | Exception]:
        """Those that train the same names with the same recipe are stacked.

        If a stack fails, each of its clients starts again alone with the same mini-batches.
        """
        return stacked([caught(partial(problem._prepared, learner)) for learner, problem in asked], minimise)

    def _prepared(self, learner: Learner) -> Prepared:
        return Prepared.of(
            learner, self.weights, self.train, learner.batches(), penalty=self.penalty, objective=self.objective
        )


@dataclass(frozen=True)
class Gradient(Problem[GradientResult]):
    """The gradient of a mini-batch's mean loss: for methods whose local step is no `Fit`.

    Attributes:
        weights: where; names that are missing take the learner's `initial` value.
        batch: one of `Learner.batches()`.
        names: with respect to which weights.
        along: given, the gradient of ⟨∇ loss, along⟩ instead, ∇ being with respect to the names in `along`: a (mixed)
            second derivative times a vector.
    """

    weights: Tensors
    batch: Batch
    names: Names
    along: Tensors | None = None

    def alone(self, learner: Learner) -> GradientResult:
        """The gradient.

        Raises:
            ValueError: if there is nothing to differentiate with respect to.
        """
        return gradients([self._prepared(learner)], whole=True)[0]

    @classmethod
    def together(cls, asked: Sequence[tuple[Learner, Self]], shared: Shared) -> list[GradientResult | Exception]:
        """Those with respect to the same names are stacked."""
        return stacked([caught(partial(problem._prepared, learner)) for learner, problem in asked], gradients)

    def _prepared(self, learner: Learner) -> Prepared:
        return Prepared.of(learner, self.weights, self.names, [self.batch], along=self.along)


@dataclass(frozen=True)
class Score(Problem[Metrics]):
    """The metrics of these weights on a split, as `Learner.test` gives them; of its first `rows` rows, if given."""

    weights: Tensors
    split: Split
    rows: int | None = None

    def alone(self, learner: Learner) -> Metrics:
        """`Learner.test`."""
        return learner.test(self.weights, self.split, self.rows)

    @classmethod
    def together(cls, asked: Sequence[tuple[Learner, Self]], shared: Shared) -> list[Metrics | Exception]:
        """Rows of all clients share passes."""
        return [*shared.scores([(learner, score.weights, score.split, score.rows) for learner, score in asked])]


@dataclass(frozen=True)
class Features(Problem[tuple[Tensor, Tensor | None]]):
    """The frozen backbone's features (n, d) of the training rows, and their class ids (n,) where there are classes."""

    def alone(self, learner: Learner) -> tuple[Tensor, Tensor | None]:
        """`Learner.features`."""
        return learner.features()

    @classmethod
    def together(
        cls, asked: Sequence[tuple[Learner, Self]], shared: Shared
    ) -> list[tuple[Tensor, Tensor | None] | Exception]:
        """Rows of all clients share passes."""
        return [*shared.features([learner for learner, _ in asked])]


@dataclass(frozen=True)
class InputNorms(Problem[dict[str, Tensor]]):
    """Module -> the norm (d_in,) of every input channel over the first training rows, as `Learner.input_norms`."""

    rows: int

    def alone(self, learner: Learner) -> dict[str, Tensor]:
        """`Learner.input_norms`."""
        return learner.input_norms(self.rows)
