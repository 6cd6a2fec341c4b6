"""Events as they come, on stderr: a line each for a log, bars for a terminal."""

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from celora.track.text import duration, printable, score, signed, size

Event = Mapping[str, Any]
Show = Callable[[Event], None]


@contextmanager
def live_progress(*, quiet: bool = False) -> Iterator[Show]:
    """What shows an event: nothing if quiet, bars in a terminal, else lines without control codes."""
    if quiet:
        yield lambda event: None
        return
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield _Lines().show
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        TextColumn("{task.fields[now]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress).show


def line(event: Event) -> str | None:
    """An event as one line, or None if it has nothing to say.

    >>> who = {"time": "2026-11-21T07:12:03+00:00", "algorithm": "ce-lora", "seed": 0}
    >>> line({"event": "notice", **who, "text": "site-c is left out: 3 rows"})
    '2026-11-21T07:12:03Z ce-lora seed 0 notice: site-c is left out: 3 rows'
    >>> line({"event": "said", "time": "2026-11-21T07:12:03+00:00", "text": "site-c is back"})
    '2026-11-21T07:12:03Z site-c is back'
    """
    if event["event"] == "said":  # between two events of the journal
        return printable(f"{event['time'].replace('+00:00', 'Z')} {event['text']}")
    if event["event"] not in ("start", "notice", "round", "end"):
        return None
    words = [event["time"].replace("+00:00", "Z"), *_who(event)]
    if event["event"] == "start":
        begin = event["from_round"]
        words.append(f"resumed after round {begin} of" if begin else "start:")
        words.append(f"{event['rounds']} rounds, {event['clients']} clients, folder {event['folder']}")
    elif event["event"] == "notice":
        words.append(f"notice: {event['text']}")
    elif event["event"] == "end":
        words.append(f"end: test {_result(event)}")
    else:
        words += [_round(event), *_scores(event), duration(event["seconds"]), *_excluded(event)]
    return printable(" ".join(words))


class _Lines:
    """The log; a notice that every algorithm repeats, or that was said before, is written once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def show(self, event: Event) -> None:
        text = line(event)
        if text is None or (event["event"] == "notice" and event["text"] in self._told):
            return
        self._told.add(event.get("text", ""))
        print(text, file=sys.stderr, flush=True)


class _Bars:
    """A bar for each algorithm and seed; the finished ones stay above the running one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told: set[str] = set()
        self._task: TaskID | None = None
        self._seconds: list[float] = []

    def show(self, event: Event) -> None:
        if event["event"] == "start":
            name = printable(" ".join(_who(event)))
            fields = {
                "total": event["rounds"],
                "completed": event["from_round"],
                "now": f"{event['clients']} clients",
            }
            self._task, self._seconds = self._progress.add_task(name, **fields), []
        elif event["event"] == "said" or (event["event"] == "notice" and event["text"] not in self._told):
            self._told.add(event["text"])
            self._progress.console.print(Text(printable(event["text"]), style="yellow"))
        elif event["event"] == "round" and self._task is not None:
            self._seconds.append(event["seconds"])
            left = event["rounds"] - event["index"]
            eta = [f"eta {duration(left * statistics.fmean(self._seconds[-10:]))}"] if left > 0 else []
            now = " ".join([_round(event), *_scores(event), *eta])
            self._progress.update(self._task, completed=min(event["index"], event["rounds"]), now=now)
            for problem in _excluded(event):
                self._progress.console.print(Text(printable(f"{_round(event)} {problem}"), style="yellow"))
        elif event["event"] == "end" and self._task is not None:
            self._progress.update(self._task, now=f"test {_result(event)}")
            self._task = None


def _who(event: Event) -> tuple[str, str]:
    return str(event["algorithm"]), f"seed {event['seed']}"


def _round(event: Event) -> str:
    rounds = str(event["rounds"])
    return "closing" if event["index"] > event["rounds"] else f"round {event['index']:0{max(2, len(rounds))}d}/{rounds}"


def _scores(event: Event) -> list[str]:
    """Validation of the trained models, in the end of the received ones; lift; bytes sent so far."""
    of, validation = "val", event["validation"].get("personal")
    if validation is None and event["index"] > event["rounds"]:
        of, validation = "received", event["validation"].get("received")
    known = [of, score(validation["mean"]), "worst", score(validation["worst"])] if validation else []
    gain = ["lift", signed(event["lift"])] if event["lift"] is not None else []
    return [*known, *gain, "up", size(event["up_bytes"])]


def _result(event: Event) -> str:
    summary = event["summary"]
    metrics = summary["metrics"]
    words = ["mean", score(metrics["mean"]), "worst decile", score(metrics["worst_decile"])]
    words += ["lift", signed(metrics["lift_mean"])] if metrics["lift_mean"] is not None else []
    return " ".join([*words, f"({summary['moment']}, round {summary['round']})"])


def _excluded(event: Event) -> list[str]:
    reasons = "; ".join(f"{client}: {why}" for client, why in event["excluded"].items())
    return [f"excluded {reasons}"] if reasons else []
