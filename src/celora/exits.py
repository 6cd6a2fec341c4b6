"""How a command ends: what went wrong, as a message on stderr and an exit code."""

import json
import shlex
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import typer

from celora.errors import (
    CeloraError,
    ConfigError,
    DataError,
    FederationError,
    ModelError,
    PolicyError,
    QuorumError,
    RunFolderError,
)

FAILED, WRONG, STOPPED = 1, 2, 4
CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong configuration, data, model, run folder, federation or policy; "
    "4 stopped, can be resumed."
)

TOLD = ConfigError | DataError | ModelError | RunFolderError | FederationError | PolicyError
"""What somebody can put right."""


@dataclass
class SessionState:
    """As much of a session as a message about its end needs."""

    folder: str | None = None
    done: int = 0
    rounds: int = 0

    def note(self, event: dict[str, Any]) -> None:
        """Remember where the session stands."""
        if event["event"] == "session":
            self.folder, self.rounds = event["folder"], event["rounds"]
        elif event["event"] == "start":
            self.done, self.rounds = event["from_round"], event["rounds"]
        elif event["event"] == "round":
            self.done = min(event["index"], event["rounds"])
        elif event["event"] == "end":  # the next algorithm has not begun
            self.done = 0

    def remedy(self) -> str:
        """The command that goes on."""
        return f"celora resume {shlex.quote(self.folder)}" if self.folder else "give the same command again"

    def stopped(self) -> str:
        """Where it stopped, and how to go on."""
        if self.folder is None:
            return f"stopped before the first round: {self.remedy()}"
        return f"stopped after round {self.done} of {self.rounds}; nothing is lost: {self.remedy()}"


@contextmanager
def explained(session: SessionState, *, as_json: bool) -> Iterator[None]:
    """Turn what goes wrong into a message and an exit code; Ctrl-C and SIGTERM end in good order.

    Raises:
        typer.Exit: with the code of the first thing that went wrong.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        _fail(as_json, STOPPED, "Stopped", session.stopped())
    except QuorumError as error:
        _fail(as_json, STOPPED, "QuorumError", f"{error}\n{session.stopped()}")
    except CeloraError as error:
        code = WRONG if isinstance(error, TOLD) else FAILED
        problems = error.problems if isinstance(error, ConfigError) else []
        _fail(as_json, code, type(error).__name__, str(error), problems)
    except Exception as error:
        traceback.print_exc()
        message = f"unexpected {type(error).__name__}: {error}\nto go on: {session.remedy()}"
        _fail(as_json, FAILED, type(error).__name__, message)
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(as_json: bool, code: int, kind: str, message: str, problems: list[str] | None = None) -> NoReturn:
    if as_json:
        error = {"kind": kind, "message": message, "problems": problems or []}
        typer.echo(json.dumps({"error": error}, indent=2))
    typer.echo(message, err=True)
    raise typer.Exit(code)
