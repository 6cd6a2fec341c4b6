"""Whoever runs the clients: `solve` one after another, `solve_together` side by side.

Turns that ask for the same kind of thing at the same time are answered together, in as few passes through the frozen
backbone as pay (`celora.core.training`, `Shared`); no turn can tell.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

from celora.core.learner import ClientUpdate, Features, Fit, Gradient, InputNorms, Learner, Problem, Score, Shared
from celora.core.training import caught, fit, fit_together, gradient_at, gradients_together

T = TypeVar("T")

LearnerUpdate = tuple[Learner, ClientUpdate[T]]
Solve = Callable[[Sequence[LearnerUpdate[Any]]], list[Any]]
"""Runs turns to their ends; in place of a turn's value stands the `Exception` it raised."""


def solve(jobs: Sequence[LearnerUpdate[T]]) -> list[T | Exception]:
    """Run each turn to its end, one client after another."""
    return [value for job in jobs for value in _run([job], _one_by_one)]


def solve_together(jobs: Sequence[LearnerUpdate[T]]) -> list[T | Exception]:
    """Run all turns side by side, and what they ask for at the same time in as few passes as pay."""
    return _run(jobs, _together)


Asked = Sequence[tuple[Learner, Problem]]


def _run(jobs: Sequence[LearnerUpdate[T]], solver: Callable[[Asked], list[Any]]) -> list[T | Exception]:
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
        answers = dict(zip(asked, solver([(jobs[at][0], problem) for at, problem in asked.items()]), strict=True))
    return [ends[at] for at in range(len(jobs))]


def _go_on(turn: ClientUpdate[Any], answer: Any) -> Problem:
    """The turn's next problem; an answer that is an exception is raised inside it."""
    return turn.throw(answer) if isinstance(answer, Exception) else turn.send(answer)


def _one_by_one(asked: Asked) -> list[Any]:
    """Each problem's answer, or the exception it ended in."""
    return [caught(partial(_alone, learner, problem)) for learner, problem in asked]


def _alone(learner: Learner, problem: Problem) -> object:
    match problem:
        case Fit():
            return fit(learner, problem)
        case Gradient():
            return gradient_at(learner, problem)
        case Score(weights, split, rows):
            return learner.test(weights, split, rows)
        case Features():
            return learner.features()
        case InputNorms(rows):
            return learner.input_norms(rows)


def _together(asked: Asked) -> list[Any]:
    """The same, where problems of one kind from learners that share a backbone share passes."""
    answers: list[Any] = [None] * len(asked)
    alike: dict[Hashable, list[int]] = {}
    for at, (learner, problem) in enumerate(asked):
        alike.setdefault(at if learner.shared is None else (id(learner.shared), type(problem)), []).append(at)
    for group in alike.values():
        for at, answer in zip(group, _alike([asked[at] for at in group]), strict=True):
            answers[at] = answer
    return answers


def _alike(asked: Asked) -> list[Any]:
    """Answers to problems of one kind; if together they fail, each alone, so that only the culprit does."""
    shared = asked[0][0].shared
    if shared is None or isinstance(asked[0][1], InputNorms):
        return _one_by_one(asked)
    if isinstance(asked[0][1], Fit):
        return fit_together([(learner, problem) for learner, problem in asked if isinstance(problem, Fit)])
    if isinstance(asked[0][1], Gradient):
        return gradients_together([(learner, problem) for learner, problem in asked if isinstance(problem, Gradient)])
    answers = caught(partial(_jointly, shared, asked))
    return _one_by_one(asked) if isinstance(answers, Exception) else answers


def _jointly(shared: Shared, asked: Asked) -> list[Any]:
    if isinstance(asked[0][1], Features):
        return list(shared.features([learner for learner, _ in asked]))
    return list(shared.scores([(learner, problem) for learner, problem in asked if isinstance(problem, Score)]))
