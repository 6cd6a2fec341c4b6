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

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from celora.core.learner import Batch, Learner, Losses, Metrics
from celora.core.optim import AdamW, unflatten
from celora.lazy import Tensor, torch
from celora.tensors import Names, Tensors, common, flatten, on_device

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


@dataclass(frozen=True)
class Fitted:
    """A solved `Fit`: all weights on the CPU, the trained ones new and detached; `metrics` holds loss and steps."""

    weights: dict[str, Tensor]
    metrics: Metrics


@dataclass(frozen=True)
class GradientResult:
    """A solved `Gradient`: the loss (before any clipping, penalty or decay), and the gradient on the CPU."""

    loss: float
    gradient: dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A `Fit` or a `Gradient` made ready.

    Attributes:
        start: all weights, as they were handed in.
        shapes: of those with respect to which the loss is differentiated.
        batches: the mini-batches, one a step.
        penalty, objective: of a `Fit`.
        along: of a `Gradient`.
    """

    learner: Learner
    start: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    batches: Sequence[Batch]
    penalty: Callable[[Tensors], Tensor] | None
    objective: Callable[[Losses, Tensors], Tensor] | None
    along: Tensors | None

    @staticmethod
    def of(
        learner: Learner,
        weights: Tensors,
        names: Names,
        batches: Iterable[Batch],
        *,
        penalty: Callable[[Tensors], Tensor] | None = None,
        objective: Callable[[Losses, Tensors], Tensor] | None = None,
        along: Tensors | None = None,
    ) -> Prepared:
        """Weights that are missing take the learner's `initial` value.

        Raises:
            ValueError: if no weight is in `names`.
        """
        start = {**learner.initial, **weights}
        shapes = {name: w.shape for name, w in start.items() if names(name)}
        if not shapes:
            raise ValueError(f"nothing to train among {', '.join(start)}")
        return Prepared(learner, start, shapes, list(batches), penalty, objective, along)

    @property
    def kind(self) -> Hashable:
        """Tasks of one kind, of learners that share a backbone, can be stacked."""
        shapes = tuple((name, w.shape) for name, w in self.start.items())
        along = None if self.along is None else tuple(self.along)
        return self.learner.recipe, tuple(self.shapes), shapes, self.objective, along


def stacked(problems: Sequence[Prepared | Exception], work: Callable[..., list[T]]) -> list[T | Exception]:
    """What `work` makes of the problems, those together that can be stacked.

    If a stack fails, each of its problems is worked on alone, so that only the culprit fails.
    """
    done: dict[int, T | Exception] = {
        at: problem for at, problem in enumerate(problems) if isinstance(problem, Exception)
    }
    alike: dict[Hashable, list[int]] = {}
    for at, problem in enumerate(problems):
        if not isinstance(problem, Exception):
            alike.setdefault(problem.kind, []).append(at)
    for group in alike.values():
        members = [problem for at in group if not isinstance(problem := problems[at], Exception)]
        together = caught(partial(work, members))
        ends: list[T | Exception] = (
            [caught(partial(_only, work, problem)) for problem in members]
            if isinstance(together, Exception)
            else [*together]
        )
        done |= dict(zip(group, ends, strict=True))
    return [done[at] for at in range(len(problems))]


def _only(work: Callable[..., list[T]], problem: Prepared) -> T:
    return work([problem], whole=True)[0]


def minimise(problems: Sequence[Prepared], *, whole: bool = False) -> list[Fitted]:
    """All problems side by side, their mini-batches cut and joined, or `whole` and each in a pass of its own.

    A client's trained weights are one row, so clipping and AdamW are a handful of operations however many matrices are
    adapted and however many clients train.
    """
    order = sorted(range(len(problems)), key=lambda at: -len(problems[at].batches))
    ranked = _moved([problems[at] for at in order])
    shapes, recipe = ranked[0].shapes, ranked[0].learner.recipe
    stack = torch.stack([flatten({name: problem.start[name] for name in shapes}) for problem in ranked])
    adamw = AdamW(stack, recipe)
    steps = [len(problem.batches) for problem in ranked]
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
        weights = {name: new[name] if name in new else w.cpu() for name, w in problems[at].start.items()}
        mean = totals[row] / steps[row] if steps[row] else math.nan
        solved[at] = Fitted(weights, {"loss": mean, "steps": float(steps[row])})
    return [solved[at] for at in range(len(problems))]


def _moved(problems: Sequence[Prepared]) -> list[Prepared]:
    """The problems with their weights on the device."""
    starts = on_device([problem.start for problem in problems], problems[0].learner.device)
    return [replace(problem, start=start) for problem, start in zip(problems, starts, strict=True)]


@dataclass(frozen=True)
class _Piece:
    """A part of a mini-batch, whose mean loss has this share in the batch's; `row` is its client's in the stack."""

    row: int
    problem: Prepared
    batch: Batch
    share: float


def _passes(problems: Sequence[Prepared], step: int, whole: bool) -> Iterator[list[_Piece]]:
    """The mini-batches of this step."""
    shared = problems[0].learner.shared
    if shared is None or whole:
        yield from ([_Piece(row, problem, problem.batches[step], 1.0)] for row, problem in enumerate(problems))
        return
    pieces: list[_Piece] = []
    for row, problem in enumerate(problems):
        parts = shared.cut(problem.batches[step])
        shares = _shares([shared.count(part) for part in parts])
        pieces += [_Piece(row, problem, part, share) for part, share in zip(parts, shares, strict=True)]
    sizes = [shared.size(piece.batch) for piece in pieces]
    for chosen in passes(sizes, shared.capacity):
        yield [pieces[at] for at in chosen]


def _shares(counts: Sequence[int]) -> list[float]:
    """Each piece's share of its batch; where nothing counts all losses are 0, and penalties are shared evenly."""
    total = sum(counts)
    return [count / total for count in counts] if total else [1 / len(counts)] * len(counts)


def gradients(problems: Sequence[Prepared], *, whole: bool = False) -> list[GradientResult]:
    """Each problem's gradient at its start."""
    problems = _moved(problems)
    shapes = problems[0].shapes
    stack = torch.stack([flatten({name: problem.start[name] for name in shapes}) for problem in problems])
    losses, gradient = torch.zeros(len(problems), device=stack.device), torch.zeros_like(stack)
    for pieces in _passes(problems, 0, whole):
        where = torch.tensor([piece.row for piece in pieces]).to(stack.device, non_blocking=True)
        loss, ascent = _gradients(stack[where], pieces)
        losses.index_add_(0, where, loss.float())
        gradient.index_add_(0, where, ascent)
    rows = [{name: w.clone() for name, w in unflatten(row, shapes).items()} for row in gradient.cpu()]
    return [GradientResult(loss, row) for loss, row in zip(losses.tolist(), rows, strict=True)]


def _gradients(start: Tensor, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
    """Losses (K,) and gradients (K, n) of one pass, each times its share; a piece that is alone has no leading axis."""
    first, alone = pieces[0].problem, len(pieces) == 1
    vector = (start[0] if alone else start).detach().requires_grad_(True)
    trained = unflatten(vector, first.shapes)
    frozen = {n: common([piece.problem.start[n] for piece in pieces]) for n in first.start if n not in trained}
    weights = {name: trained[name] if name in trained else frozen[name] for name in first.start}
    shared, batches = first.learner.shared, [piece.batch for piece in pieces]
    batch = batches[0] if alone or shared is None else shared.join(batches)
    shares = torch.tensor([piece.share for piece in pieces]).to(start.device, non_blocking=True)
    shares = (shares[0] if alone else shares).to(start.dtype)
    losses = partial(first.learner.losses, batch=batch)
    if first.along is not None:
        loss, gradient = _along(losses, weights, shares, vector, [piece.problem.along or {} for piece in pieces])
        return loss.detach().reshape(-1), gradient.view_as(start)
    loss = (losses(weights) if first.objective is None else first.objective(losses, weights)) * shares
    objective = loss.sum()
    for at, piece in enumerate(pieces):
        if piece.problem.penalty is not None:
            start_of = piece.problem.start
            own = {n: start_of[n] if n in frozen else w if alone else w[at] for n, w in weights.items()}
            objective = objective + piece.share * piece.problem.penalty(own)
    (gradient,) = torch.autograd.grad(objective, vector)
    return loss.detach().reshape(-1), gradient.view_as(start)


def _along(
    losses: Losses, weights: dict[str, Tensor], shares: Tensor, vector: Tensor, along: Sequence[Tensors]
) -> tuple[Tensor, Tensor]:
    """Losses, and ∇ of ⟨∇ losses, along⟩ with respect to `vector`; both add up over the pieces of a batch."""
    many = len(along) > 1
    leaves = {
        name: weights[name]
        if weights[name].requires_grad
        else (weights[name].expand(len(along), *w.shape) if many and weights[name].dim() == w.dim() else weights[name])
        .detach()
        .requires_grad_(True)
        for name, w in along[0].items()
    }
    attention = torch.nn.attention
    with attention.sdpa_kernel(attention.SDPBackend.MATH):  # the fast attention kernels have no second derivative
        loss = losses({**weights, **leaves}) * shares
        inner = torch.autograd.grad(loss.sum(), list(leaves.values()), create_graph=True)
        vectors = [torch.stack([one[name] for one in along]) if many else along[0][name] for name in leaves]
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
