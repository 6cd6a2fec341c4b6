"""Whoever runs the clients: `solve` one after another, `solve_together` many in one pass through the frozen backbone.

    active prefix      clients sorted by their number of steps; at step s those that still have a batch, a prefix
    pass               of the active clients, those with batches of like length, up to the backbone's capacity
    stack              (K, n): a client's trained weights are a row; gradient, clipping and AdamW are per row

A pass hands each adapted layer weights with a leading client axis; the frozen products see all rows of all K clients.
Who is in a pass is decided by lengths alone, and nobody's numbers depend on it but for rounding (1e-5 in weights).
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from celora.core.learner import Batch, Encode, Fit, Fitted, Learner, Problem, Recipe, Score, Shared, Turn
from celora.tensors import common, flatten

T = TypeVar("T")

Job = tuple[Learner, Turn[T]]
Solve = Callable[[Sequence[Job[Any]]], list[Any]]
"""Runs turns to their ends; in place of a turn's value stands the `Exception` it raised."""

FILLING = 1.1
"""Batches share a pass while filling them up to one shape makes them at most this much larger than they are."""


def solve(jobs: Sequence[Job[T]]) -> list[T | Exception]:
    """Run each turn to its end, one client after another."""
    return [value for job in jobs for value in _run([job], most=1)]


def solve_together(jobs: Sequence[Job[T]], most: int | None = None) -> list[T | Exception]:
    """Run all turns side by side, and what they ask for at the same time in as few passes as pay.

    Args:
        most: clients in a pass; None leaves it to the backbone's capacity, 1 is `solve`.
    """
    return solve(jobs) if most == 1 else _run(jobs, most)


def _run(jobs: Sequence[Job[T]], most: int | None) -> list[T | Exception]:
    ends: dict[int, T | Exception] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(jobs)))
    while answers:
        asked: dict[int, Problem] = {}
        for at, answer in answers.items():
            try:
                asked[at] = _go_on(jobs[at][1], answer)
            except StopIteration as end:
                ends[at] = end.value
            except Exception as error:  # one client's failure is the caller's to report, not the other clients' end
                ends[at] = error
        answers = dict(
            zip(asked, _answer([(jobs[at][0], problem) for at, problem in asked.items()], most), strict=True)
        )
    return [ends[at] for at in range(len(jobs))]


def _go_on(turn: Turn[Any], answer: Any) -> Problem:
    """The turn's next problem; an answer that is an exception is raised inside it."""
    return turn.throw(answer) if isinstance(answer, Exception) else turn.send(answer)


Asked = tuple[Learner, Problem]


def _answer(asked: Sequence[Asked], most: int | None) -> list[Any]:
    """Each problem's answer, or the exception it ended in; those that can share passes do."""
    answers: list[Any] = [None] * len(asked)
    alike: dict[Hashable, list[int]] = {}
    for at, (learner, problem) in enumerate(asked):
        shared = None if most == 1 else learner.shared
        alike.setdefault(at if shared is None else (id(shared), type(problem)), []).append(at)
    for group in alike.values():
        for at, answer in zip(group, _together([asked[at] for at in group], most), strict=True):
            answers[at] = answer
    return answers


def _together(asked: Sequence[Asked], most: int | None) -> list[Any]:
    """Answers to problems of one kind; if together they fail, each alone, so that only the culprit does."""
    if isinstance(asked[0][1], Fit):
        return fit_together([(learner, problem) for learner, problem in asked if isinstance(problem, Fit)], most)
    shared = asked[0][0].shared
    if shared is not None and len(asked) > 1:
        answers = _caught(partial(_jointly, shared, asked, most))
        if not isinstance(answers, Exception):
            return answers
    return [_caught(partial(_alone, *one)) for one in asked]


def _jointly(shared: Shared, asked: Sequence[Asked], most: int | None) -> list[Any]:
    if isinstance(asked[0][1], Encode):
        return list(shared.features([learner for learner, _ in asked]))
    return list(shared.scores([(learner, problem) for learner, problem in asked if isinstance(problem, Score)], most))


def _alone(learner: Learner, problem: Problem) -> object:
    return learner.test(problem.weights, problem.split) if isinstance(problem, Score) else learner.features()


def _caught(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


# --- training


def fit(learner: Learner, problem: Fit) -> Fitted:
    """Minimise the learner's loss over the trained weights, as the recipe says.

    Raises:
        ValueError: if nothing is to be trained.
    """
    (fitted,) = fit_together([(learner, problem)], most=1)
    if isinstance(fitted, Exception):
        raise fitted
    return fitted


@dataclass(frozen=True)
class _Task:
    """A `Fit` made ready: where it starts, what of it is trained, and its mini-batches."""

    learner: Learner
    problem: Fit
    start: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    batches: Sequence[Batch]

    @staticmethod
    def of(learner: Learner, problem: Fit) -> "_Task":
        start = {name: w.to(learner.device) for name, w in {**learner.initial, **problem.weights}.items()}
        shapes = {name: w.shape for name, w in start.items() if problem.train(name)}
        if not shapes:
            raise ValueError(f"nothing to train among {', '.join(start)}")
        return _Task(learner, problem, start, shapes, list(learner.batches()))


def fit_together(problems: Sequence[tuple[Learner, Fit]], most: int | None = None) -> list[Fitted | Exception]:
    """Solve `Fit`s of learners that share a backbone; in place of a solution stands the exception it ended in.

    Those that train the same names with the same recipe are stacked. If a stack fails, each of its clients starts
    again alone with the same mini-batches, so that only the culprit fails.
    """
    tasks = [_caught(partial(_Task.of, *problem)) for problem in problems]
    solved: list[Fitted | Exception] = [task if isinstance(task, Exception) else RuntimeError() for task in tasks]
    alike: dict[Hashable, list[int]] = {}
    for at, task in enumerate(tasks):
        if not isinstance(task, Exception):
            shared = at if task.learner.shared is None else id(task.learner.shared)
            kind = (shared, task.learner.recipe, tuple(task.shapes.items()), tuple(task.start))
            alike.setdefault(kind, []).append(at)
    for group in alike.values():
        members = [task for at in group if not isinstance(task := tasks[at], Exception)]
        for at, answer in zip(group, _stacked(members, most), strict=True):
            solved[at] = answer
    return solved


def _stacked(tasks: Sequence[_Task], most: int | None) -> Sequence[Fitted | Exception]:
    solved = _caught(partial(_minimise, tasks, most))
    if not isinstance(solved, Exception):
        return solved
    return [solved] if len(tasks) == 1 else [_caught(partial(_only, task)) for task in tasks]


def _only(task: _Task) -> Fitted:
    return _minimise([task], most=1)[0]


def _minimise(tasks: Sequence[_Task], most: int | None) -> list[Fitted]:
    """All tasks side by side. A client's trained weights are one row, so clipping and AdamW are a handful of
    operations however many matrices are adapted and however many clients train."""
    order = sorted(range(len(tasks)), key=lambda at: -len(tasks[at].batches))
    ranked = [tasks[at] for at in order]
    shapes, recipe = ranked[0].shapes, ranked[0].learner.recipe
    shared = ranked[0].learner.shared
    stack = torch.stack([flatten({name: task.start[name] for name in shapes}) for task in ranked])
    adamw = AdamW(stack, recipe)
    steps = [len(task.batches) for task in ranked]
    losses = torch.zeros(len(ranked), max(steps), device=stack.device)
    for step in range(max(steps)):
        active = sum(count > step for count in steps)
        gradient = torch.empty_like(stack[:active])
        sizes = [shared.size(task.batches[step]) for task in ranked[:active]] if shared and active > 1 else [(1, 1)]
        for rows in passes(sizes, shared.capacity if shared else 1, most):
            where = torch.tensor(rows).to(stack.device, non_blocking=True)
            losses[where, step], gradient[where] = _gradients(stack[where], [ranked[row] for row in rows], step)
        rates = [recipe.lr * (1 - step / count if recipe.decay == "linear" else 1.0) for count in steps[:active]]
        rate = torch.tensor(rates, dtype=stack.dtype).to(stack.device, non_blocking=True)
        stack[:active] = adamw.step(stack[:active], gradient, rate.unsqueeze(1))
    totals: list[float] = losses.sum(1).tolist()
    ends = stack.cpu()
    solved: dict[int, Fitted] = {}
    for row, at in enumerate(order):
        new = {name: w.clone() for name, w in _unflatten(ends[row], shapes).items()}
        weights = {name: new[name] if name in new else w.cpu() for name, w in ranked[row].start.items()}
        mean = totals[row] / steps[row] if steps[row] else math.nan
        solved[at] = Fitted(weights, {"loss": mean, "steps": float(steps[row])})
    return [solved[at] for at in range(len(tasks))]


def _gradients(start: Tensor, tasks: Sequence[_Task], step: int) -> tuple[Tensor, Tensor]:
    """Losses (K,) and gradients (K, n) of one pass; a client that is alone has no client axis."""
    first, alone = tasks[0], len(tasks) == 1
    vector = (start[0] if alone else start).detach().requires_grad_(True)
    trained = _unflatten(vector, first.shapes)
    frozen = {name: common([task.start[name] for task in tasks]) for name in first.start if name not in trained}
    weights = {name: trained[name] if name in trained else frozen[name] for name in first.start}
    batches = [task.batches[step] for task in tasks]
    shared = first.learner.shared
    batch = batches[0] if alone or shared is None else shared.join(batches)
    loss = first.learner.losses(weights, batch)
    objective = loss.sum()
    for at, task in enumerate(tasks):
        if task.problem.penalty is not None:
            own = {name: task.start[name] if name in frozen else w if alone else w[at] for name, w in weights.items()}
            objective = objective + task.problem.penalty(own)
    (gradient,) = torch.autograd.grad(objective, vector)
    return loss.detach(), gradient


def _unflatten(vector: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Views of a vector (..., n) as named tensors (..., *shape)."""
    pieces = torch.split(vector, [shape.numel() for shape in shapes.values()], dim=-1)
    lead = vector.shape[:-1]
    return {name: piece.view(*lead, *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def passes(sizes: Sequence[tuple[int, int]], capacity: int, most: int | None = None) -> Iterator[list[int]]:
    """Which batches share a pass: neighbours in length, up to the capacity, while filling costs little.

    Args:
        sizes: (rows, longest row) of each batch.
        capacity: largest filled size of a pass of more than one batch.
        most: batches in a pass; None: any number.

    Returns:
        Lists of positions that cover all batches once.
    """
    order = sorted(range(len(sizes)), key=lambda at: (sizes[at][1], sizes[at][0]))
    chosen: list[int] = []
    rows = longest = content = 0
    for at in order:
        height, width = max(rows, sizes[at][0]), max(longest, sizes[at][1])
        filled, own = (len(chosen) + 1) * height * width, content + math.prod(sizes[at])
        if chosen and (filled > capacity or filled > FILLING * own or len(chosen) == most):
            yield chosen
            chosen, content = [], 0
            height, width, own = *sizes[at], math.prod(sizes[at])
        chosen.append(at)
        rows, longest, content = height, width, own
    if chosen:
        yield chosen


class AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019, algorithm 2) with gradient clipping, on the rows of a matrix (K, n).

    Rows do not touch each other. When fewer rows are given than before, the last ones are done: their moments are
    dropped. torch's own optimiser gives the same numbers (a test holds them against each other); this one costs a
    tenth of the time on a hundred small matrices.
    """

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self, like: Tensor, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, 0
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, rows: Tensor, gradient: Tensor, rate: Tensor) -> Tensor:
        """The rows (K, n) after one step at rates (K, 1)."""
        if self.recipe.clip:
            norm = gradient.norm(dim=-1, keepdim=True)
            gradient = gradient * (self.recipe.clip / norm.clamp(min=self.recipe.clip))
        self.steps += 1
        self.first = self.first[: len(rows)].lerp_(gradient, 1 - self.beta1)
        self.second = self.second[: len(rows)].lerp_(gradient * gradient, 1 - self.beta2)
        root = (self.second / (1 - self.beta2**self.steps)).sqrt_().add_(self.eps)
        move = self.first / (1 - self.beta1**self.steps) / root
        return rows * (1 - rate * self.recipe.weight_decay) - rate * move
