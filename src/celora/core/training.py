"""Local training and gradients, of one client or of many in one pass through the frozen backbone.

    active prefix      clients sorted by their number of steps; at step s those that still have a batch, a prefix
    piece              a mini-batch, or each of its rows where they are of unlike length; its mean loss has a share in
                       the batch's, by what counts in it: rows, or target tokens
    pass               pieces of like length of any of the active clients, up to the backbone's capacity
    stack              (m, n): a client's trained weights are a row; gradient, clipping and AdamW are per row

A pass hands each adapted layer weights with a leading axis of K pieces; the frozen products see all their rows at once.
So nothing is padded for the sake of its own batch, and no pass is too small to be worth its cost. Who is in a pass is
decided by lengths alone, and nobody's numbers depend on it but for rounding: 1e-5 in weights, more in one of a
thousand where AdamW divides a tiny gradient by its own size.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from celora.core.learner import Batch, Fit, Fitted, Gradient, GradientResult, Learner
from celora.core.optim import AdamW, unflatten
from celora.tensors import Names, Tensors, common, flatten

T = TypeVar("T")

FILLING = 1.1
"""Rows are filled up to one shape, in a batch or in a pass, while that makes it at most this much larger …"""
PASS = 1 / 16
"""… or costs a pass no more than another one would: so much of the capacity. (MiniLM on a CPU, measured: a pass costs
as much as 30 tokens with one thread and 130 with two, besides its tokens; the capacity is 1,024.)"""


def caught(work: Callable[[], T]) -> T | Exception:
    """What the work gives, or the exception it ends in."""
    try:
        return work()
    except Exception as error:
        return error


def fit(learner: Learner, problem: Fit) -> Fitted:
    """Minimise the learner's loss over the trained weights, as the recipe says.

    Raises:
        ValueError: if nothing is to be trained.
    """
    return _minimise([_Task.of(learner, problem)], whole=True)[0]


def fit_together(problems: Sequence[tuple[Learner, Fit]]) -> list[Fitted | Exception]:
    """Solve `Fit`s of learners that share a backbone; in place of a solution stands the exception it ended in.

    Those that train the same names with the same recipe are stacked. If a stack fails, each of its clients starts
    again alone with the same mini-batches, so that only the culprit fails.
    """
    return _stacked([caught(partial(_Task.of, *problem)) for problem in problems], _minimise)


def gradient_at(learner: Learner, problem: Gradient) -> GradientResult:
    """A `Gradient`'s answer.

    Raises:
        ValueError: if there is nothing to differentiate with respect to.
    """
    return _gradients_at([_Task.at(learner, problem)], whole=True)[0]


def gradients_together(problems: Sequence[tuple[Learner, Gradient]]) -> list[GradientResult | Exception]:
    """Answer `Gradient`s of learners that share a backbone in as few passes as pay."""
    return _stacked([caught(partial(_Task.at, *problem)) for problem in problems], _gradients_at)


def _stacked(tasks: Sequence["_Task | Exception"], work: Callable[..., list[T]]) -> list[T | Exception]:
    """What `work` makes of the tasks, those together that can be stacked."""
    done: dict[int, T | Exception] = {at: task for at, task in enumerate(tasks) if isinstance(task, Exception)}
    alike: dict[Hashable, list[int]] = {}
    for at, task in enumerate(tasks):
        if not isinstance(task, Exception):
            alike.setdefault(task.kind if task.learner.shared else at, []).append(at)
    for group in alike.values():
        members = [task for at in group if not isinstance(task := tasks[at], Exception)]
        together = caught(partial(work, members))
        ends: list[T | Exception] = (
            [caught(partial(_only, work, task)) for task in members] if isinstance(together, Exception) else [*together]
        )
        done |= dict(zip(group, ends, strict=True))
    return [done[at] for at in range(len(tasks))]


@dataclass(frozen=True)
class _Task:
    """A problem made ready: where it is posed, with respect to which weights, and its mini-batches."""

    learner: Learner
    problem: Fit | Gradient
    start: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    batches: Sequence[Batch]

    @staticmethod
    def of(learner: Learner, problem: Fit) -> "_Task":
        start, shapes = _posed(learner, problem.weights, problem.train)
        return _Task(learner, problem, start, shapes, list(learner.batches()))

    @staticmethod
    def at(learner: Learner, problem: Gradient) -> "_Task":
        start, shapes = _posed(learner, problem.weights, problem.names)
        return _Task(learner, problem, start, shapes, [problem.batch])

    @property
    def objective(self) -> Callable[..., Tensor] | None:
        return self.problem.objective if isinstance(self.problem, Fit) else None

    @property
    def kind(self) -> Hashable:
        """Tasks of one kind can be stacked."""
        shapes = tuple((name, w.shape) for name, w in self.start.items())
        along = isinstance(self.problem, Gradient) and self.problem.along and tuple(self.problem.along)
        return id(self.learner.shared), self.learner.recipe, tuple(self.shapes), shapes, self.objective, along


def _posed(learner: Learner, given: Tensors, names: Names) -> tuple[dict[str, Tensor], dict[str, torch.Size]]:
    """All weights on the device, and the shapes of those that are asked about."""
    start = {name: w.to(learner.device) for name, w in {**learner.initial, **given}.items()}
    shapes = {name: w.shape for name, w in start.items() if names(name)}
    if not shapes:
        raise ValueError(f"nothing to train among {', '.join(start)}")
    return start, shapes


def _only(work: Callable[..., list[T]], task: _Task) -> T:
    return work([task], whole=True)[0]


def _minimise(tasks: Sequence[_Task], *, whole: bool = False) -> list[Fitted]:
    """All tasks side by side, their mini-batches cut and joined, or `whole` and each in a pass of its own.

    A client's trained weights are one row, so clipping and AdamW are a handful of operations however many matrices are
    adapted and however many clients train.
    """
    order = sorted(range(len(tasks)), key=lambda at: -len(tasks[at].batches))
    ranked = [tasks[at] for at in order]
    shapes, recipe = ranked[0].shapes, ranked[0].learner.recipe
    stack = torch.stack([flatten({name: task.start[name] for name in shapes}) for task in ranked])
    adamw = AdamW(stack, recipe)
    steps = [len(task.batches) for task in ranked]
    losses = torch.zeros(len(ranked), max(steps), device=stack.device)
    for step in range(max(steps)):
        active = sum(count > step for count in steps)
        gradient = torch.zeros_like(stack[:active])
        for pieces in _passes(ranked[:active], step, whole):
            where = torch.tensor([piece.row for piece in pieces]).to(stack.device, non_blocking=True)
            loss, ascent = _gradients(stack[where], pieces)
            losses[:, step].index_add_(0, where, loss)
            gradient.index_add_(0, where, ascent)
        rates = [recipe.lr * (1 - step / count if recipe.decay == "linear" else 1.0) for count in steps[:active]]
        rate = torch.tensor(rates, dtype=stack.dtype).to(stack.device, non_blocking=True)
        stack[:active] = adamw.step(stack[:active], gradient, rate.unsqueeze(1))
    totals: list[float] = losses.sum(1).tolist()
    ends = stack.cpu()
    solved: dict[int, Fitted] = {}
    for row, at in enumerate(order):
        new = {name: w.clone() for name, w in unflatten(ends[row], shapes).items()}
        weights = {name: new[name] if name in new else w.cpu() for name, w in ranked[row].start.items()}
        mean = totals[row] / steps[row] if steps[row] else math.nan
        solved[at] = Fitted(weights, {"loss": mean, "steps": float(steps[row])})
    return [solved[at] for at in range(len(tasks))]


@dataclass(frozen=True)
class _Piece:
    """A part of a mini-batch, whose mean loss has this share in the batch's; `row` is its client's in the stack."""

    row: int
    task: _Task
    batch: Batch
    share: float


def _passes(tasks: Sequence[_Task], step: int, whole: bool) -> Iterator[list[_Piece]]:
    """The mini-batches of this step."""
    shared = tasks[0].learner.shared
    if shared is None or whole:
        yield from ([_Piece(row, task, task.batches[step], 1.0)] for row, task in enumerate(tasks))
        return
    pieces: list[_Piece] = []
    for row, task in enumerate(tasks):
        parts = shared.cut(task.batches[step])
        shares = _shares([shared.count(part) for part in parts])
        pieces += [_Piece(row, task, part, share) for part, share in zip(parts, shares, strict=True)]
    sizes = [shared.size(piece.batch) for piece in pieces]
    for chosen in passes(sizes, shared.capacity):
        yield [pieces[at] for at in chosen]


def _shares(counts: Sequence[int]) -> list[float]:
    """Each piece's share of its batch; where nothing counts all losses are 0, and penalties are shared evenly."""
    total = sum(counts)
    return [count / total for count in counts] if total else [1 / len(counts)] * len(counts)


def _gradients_at(tasks: Sequence[_Task], *, whole: bool = False) -> list[GradientResult]:
    """Each task's gradient at its start."""
    shapes = tasks[0].shapes
    stack = torch.stack([flatten({name: task.start[name] for name in shapes}) for task in tasks])
    losses, gradient = torch.zeros(len(tasks), device=stack.device), torch.zeros_like(stack)
    for pieces in _passes(tasks, 0, whole):
        where = torch.tensor([piece.row for piece in pieces]).to(stack.device, non_blocking=True)
        loss, ascent = _gradients(stack[where], pieces)
        losses.index_add_(0, where, loss.float())
        gradient.index_add_(0, where, ascent)
    rows = [{name: w.clone() for name, w in unflatten(row, shapes).items()} for row in gradient.cpu()]
    return [GradientResult(loss, row) for loss, row in zip(losses.tolist(), rows, strict=True)]


def _gradients(start: Tensor, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
    """Losses (K,) and gradients (K, n) of one pass, each times its share; a piece that is alone has no leading axis."""
    first, alone = pieces[0].task, len(pieces) == 1
    vector = (start[0] if alone else start).detach().requires_grad_(True)
    trained = unflatten(vector, first.shapes)
    frozen = {n: common([piece.task.start[n] for piece in pieces]) for n in first.start if n not in trained}
    weights = {name: trained[name] if name in trained else frozen[name] for name in first.start}
    shared, batches = first.learner.shared, [piece.batch for piece in pieces]
    batch = batches[0] if alone or shared is None else shared.join(batches)
    shares = torch.tensor([piece.share for piece in pieces]).to(start.device, non_blocking=True)
    shares = (shares[0] if alone else shares).to(start.dtype)
    if isinstance(first.problem, Gradient):
        loss, gradient = _gradient_at(
            first.learner, weights, batch, shares, vector, [piece.task.problem for piece in pieces]
        )
        return loss.detach().reshape(-1), gradient.view_as(start)
    losses = partial(first.learner.losses, batch=batch)
    loss = (losses(weights) if first.objective is None else first.objective(losses, weights)) * shares
    objective = loss.sum()
    for at, piece in enumerate(pieces):
        if isinstance(piece.task.problem, Fit) and piece.task.problem.penalty is not None:
            start_of = piece.task.start
            own = {n: start_of[n] if n in frozen else w if alone else w[at] for n, w in weights.items()}
            objective = objective + piece.share * piece.task.problem.penalty(own)
    (gradient,) = torch.autograd.grad(objective, vector)
    return loss.detach().reshape(-1), gradient.view_as(start)


def _gradient_at(
    learner: Learner,
    weights: dict[str, Tensor],
    batch: Batch,
    shares: Tensor,
    vector: Tensor,
    problems: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    """∇ of the losses with respect to `vector`, or of ⟨∇ losses, along⟩; both add up over the pieces of a batch."""
    many, along = len(problems) > 1, problems[0].along
    if along is None:
        loss = learner.losses(weights, batch) * shares
        return loss, torch.autograd.grad(loss.sum(), vector)[0]
    leaves = {
        name: weights[name]
        if weights[name].requires_grad
        else (
            weights[name].expand(len(problems), *w.shape) if many and weights[name].dim() == w.dim() else weights[name]
        )
        .detach()
        .requires_grad_(True)
        for name, w in along.items()
    }
    with sdpa_kernel(SDPBackend.MATH):  # the fast attention kernels have no second derivative
        loss = learner.losses({**weights, **leaves}, batch) * shares
        inner = torch.autograd.grad(loss.sum(), list(leaves.values()), create_graph=True)
        vectors = [torch.stack([p.along[name] for p in problems]) if many else along[name] for name in along]
        product = torch.stack([(g * v.to(g.device)).sum() for g, v in zip(inner, vectors, strict=True)]).sum()
        (gradient,) = torch.autograd.grad(product, vector, allow_unused=True)
    return loss, torch.zeros_like(vector) if gradient is None else gradient


def passes(sizes: Sequence[tuple[int, int]], capacity: int) -> Iterator[list[int]]:
    """Which pieces share a pass: neighbours in length, up to the capacity, while filling costs less than another pass.

    Args:
        sizes: (rows, longest row) of each piece.
        capacity: largest filled size of a pass of more than one piece.

    Returns:
        Lists of positions that cover all pieces once.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    chosen: list[int] = []
    rows = longest = content = 0
    for at in order:
        height, width = max(rows, sizes[at][0]), max(longest, sizes[at][1])
        filled, own = (len(chosen) + 1) * height * width, content + math.prod(sizes[at])
        if chosen and (filled > capacity or filled - own > max((FILLING - 1) * own, capacity * PASS)):
            yield chosen
            chosen, content = [], 0
            height, width, own = *sizes[at], math.prod(sizes[at])
        chosen.append(at)
        rows, longest, content = height, width, own
    if chosen:
        yield chosen
