"""Whoever runs the clients: `solve` one after another, `solve_together` side by side.

Updates that ask for the same kind of problem at the same time are answered together, in as few passes through the
frozen backbone as pay (`Problem.together`); no update can tell.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

from celora.core.learner import Learner
from celora.core.problems import ClientUpdate, Problem
from celora.core.training import caught

T = TypeVar("T")

LearnerUpdate = tuple[Learner, ClientUpdate[T]]
Solve = Callable[[Sequence[LearnerUpdate[Any]]], list[Any]]
"""Runs updates to their ends; in place of an update's value stands the `Exception` it raised."""


def solve(jobs: Sequence[LearnerUpdate[T]]) -> list[T | Exception]:
    """Run each update to its end, one client after another."""
    return [value for job in jobs for value in _run([job], _one_by_one)]


def solve_together(jobs: Sequence[LearnerUpdate[T]]) -> list[T | Exception]:
    """Run all updates side by side, and what they ask for at the same time in as few passes as pay."""
    return _run(jobs, _together)


Asked = Sequence[tuple[Learner, Problem[Any]]]


def _run(jobs: Sequence[LearnerUpdate[T]], solver: Callable[[Asked], list[Any]]) -> list[T | Exception]:
    ends: dict[int, T | Exception] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(jobs)))
    while answers:
        asked: dict[int, Problem[Any]] = {}
        for at, answer in answers.items():
            try:
                asked[at] = _go_on(jobs[at][1], answer)
            except StopIteration as end:
                ends[at] = end.value
            except Exception as error:  # one client's failure is the caller's to report, not the other clients' end
                ends[at] = error
        answers = dict(zip(asked, solver([(jobs[at][0], problem) for at, problem in asked.items()]), strict=True))
    return [ends[at] for at in range(len(jobs))]


def _go_on(update: ClientUpdate[Any], answer: Any) -> Problem[Any]:
    """The update's next problem; an answer that is an exception is raised inside it."""
    return update.throw(answer) if isinstance(answer, Exception) else update.send(answer)


def _one_by_one(asked: Asked) -> list[Any]:
    """Each problem's answer, or the exception it ended in."""
    return [caught(partial(problem.alone, learner)) for learner, problem in asked]


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
    learner, problem = asked[0]
    if learner.shared is None:
        return _one_by_one(asked)
    answers = caught(partial(type(problem).together, asked, learner.shared))
    return _one_by_one(asked) if isinstance(answers, Exception) else answers
