"""celora.cli: exit codes, messages, and who gets which stream; the sessions are made of prepared events."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from celora import cli, errors, experiment
from celora.privacy import keys
from tests.unit.summaries import Event, session, summary

Script = Callable[[], Iterator[Event]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command whose session is `script`."""

    def invoke(script: Script, *words: str) -> Result:
        monkeypatch.setattr(experiment, "read", lambda path, sets: SimpleNamespace(plan=SimpleNamespace(seed=5)))
        monkeypatch.setattr(experiment, "run", lambda chosen, folder, **options: script())
        monkeypatch.setattr(experiment, "resume", lambda folder, log: script())
        monkeypatch.setattr(experiment, "compare", lambda chosen, labels, seeds, folder, match: script())
        return CliRunner().invoke(cli.app, list(words))

    return invoke


def until(rounds: int, end: Callable[[], None], closed: list[bool] | None = None) -> Script:
    """A session in which something happens after so many rounds."""

    def script() -> Iterator[Event]:
        try:
            for event in session(folder="runs/my demo"):
                yield event
                if event["event"] == "round" and event["index"] == rounds:
                    end()
        finally:
            if closed is not None:
                closed.append(True)

    return script


def throw(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


# --- a good end


def test_a_run_prints_its_table_to_stdout_and_plain_lines_to_stderr(play: Callable[..., Result]) -> None:
    result = play(session, "run", "demo.toml")
    assert result.exit_code == 0
    assert "site-b" in result.stdout
    assert "runs/demo/adapters" in result.stdout
    lines = result.stderr.splitlines()
    expected = "ce-lora seed 0 round 07/20 val 0.812 worst 0.741 lift +0.031 up 6.0 KiB 12.4s"
    assert f"2026-11-21T07:12:03Z {expected}" in lines
    assert "2026-11-21T07:12:03Z ce-lora seed 0 closing received 0.790 worst 0.700 up 6.0 KiB 12.4s" in lines
    assert "\x1b" not in result.output
    assert "\r" not in result.output
    assert sum("site-z is left out" in text for text in lines) == 1


def test_what_is_said_between_events_is_shown_at_once_and_its_notice_is_not(
    play: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    play(session, "run", "demo.toml")  # for its monkeypatches

    def resumed(folder: object, log: Callable[[str], None]) -> Iterator[Event]:
        log("site-z is left out: 3 rows")  # which the session gives as notices too
        yield from session()

    monkeypatch.setattr(experiment, "resume", resumed)
    lines = CliRunner().invoke(cli.app, ["resume", "runs/demo"]).stderr.splitlines()
    assert lines[0].endswith("Z site-z is left out: 3 rows")
    assert sum("site-z is left out" in text for text in lines) == 1
    assert CliRunner().invoke(cli.app, ["resume", "runs/demo", "--quiet"]).stderr == ""


def test_json_is_one_object_and_nothing_else(play: Callable[..., Result]) -> None:
    result = play(session, "run", "demo.toml", "--json")
    assert json.loads(result.stdout) == summary()
    assert result.stderr == ""
    listed = play(lambda: session("compare"), "compare", "demo.toml", "--algorithms", "ce-lora", "--json")
    assert json.loads(listed.stdout) == [summary("local"), summary()]
    assert json.loads(play(lambda: session("compare"), "resume", "runs/demo", "--json").stdout) == json.loads(
        listed.stdout
    )


def test_quiet_prints_the_folder(play: Callable[..., Result]) -> None:
    result = play(session, "run", "demo.toml", "--quiet")
    assert (result.stdout, result.stderr) == ("runs/demo\n", "")


def test_a_comparison_ends_with_its_table(play: Callable[..., Result]) -> None:
    result = play(lambda: session("compare"), "compare", "demo.toml", "--algorithms", "ce-lora")
    assert [text.split()[0] for text in result.stdout.splitlines() if "2m41s" in text] == ["local", "ce-lora"]
    assert "runs/demo/compare.json" in result.stdout


@pytest.mark.parametrize(("words", "seeds"), [((), [5]), (("--seeds", "0, 2,"), [0, 2])])
def test_algorithms_and_seeds_arrive_as_written(
    words: tuple[str, ...], seeds: list[int], play: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compare(chosen: object, labels: list[str], numbers: list[int], folder: object, match: str) -> Iterator[Event]:
        seen.append((labels, numbers, match))
        return session("compare")

    play(session, "run", "demo.toml")  # so that `read` is a stand-in, too
    monkeypatch.setattr(experiment, "compare", compare)
    CliRunner().invoke(cli.app, ["compare", "demo.toml", "--algorithms", "fedit, ce-lora", *words])
    CliRunner().invoke(cli.app, ["compare", "demo.toml", "--algorithms", "fedit", *words, "--match", "floats"])
    assert seen == [(["fedit", "ce-lora"], seeds, "rank"), (["fedit"], seeds, "floats")]


# --- other ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError(["adapter.rnak: unknown key. Did you mean 'rank'?"]), 2),
        (errors.DataError("no column 'text'"), 2),
        (errors.ModelError("no module matches 'querry'"), 2),
        (errors.RunFolderError("runs/demo exists already"), 2),
        (errors.FederationError("no node speaks for client site-a"), 2),
        (errors.PolicyError("fedit.Up does not leave this site"), 2),
        (errors.QuorumError("round 4: 1 usable replies, the quorum is 2"), 4),
        (errors.WireError("the frame is truncated"), 1),
    ],
)
def test_errors_become_a_message_and_their_exit_code(
    error: errors.CeloraError, code: int, play: Callable[..., Result]
) -> None:
    result = play(until(3, throw(error)), "run", "demo.toml")
    assert result.exit_code == code
    assert str(error) in result.stderr
    assert "Traceback" not in result.output
    told = json.loads(play(until(3, throw(error)), "run", "demo.toml", "--json").stdout)["error"]
    assert told["kind"] == type(error).__name__
    assert str(error) in told["message"]
    assert told["problems"] == getattr(error, "problems", [])


def test_a_missed_quorum_says_how_to_go_on(play: Callable[..., Result]) -> None:
    result = play(until(3, throw(errors.QuorumError("too few"))), "run", "demo.toml")
    assert "stopped after round 3 of 20; nothing is lost: celora resume 'runs/my demo'" in result.stderr


def test_stopped_between_two_algorithms_no_round_of_the_second_is_done(play: Callable[..., Result]) -> None:
    def script() -> Iterator[Event]:
        for event in session(folder="runs/my demo"):
            yield event
            if event["event"] == "end":
                raise errors.QuorumError("no site takes part")

    assert "stopped after round 0 of 20" in play(script, "run", "demo.toml").stderr


def test_ctrl_c_closes_the_session_and_says_how_to_go_on(play: Callable[..., Result]) -> None:
    closed: list[bool] = []
    result = play(until(6, throw(KeyboardInterrupt()), closed), "run", "demo.toml")
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1] == (
        "stopped after round 6 of 20; nothing is lost: celora resume 'runs/my demo'"
    )
    assert closed == [True]
    told = json.loads(play(until(6, throw(KeyboardInterrupt())), "resume", "runs/x", "--json").stdout)
    assert told["error"]["kind"] == "Stopped"


def test_sigterm_is_ctrl_c_and_the_handler_is_put_back(play: Callable[..., Result]) -> None:
    before, closed = signal.getsignal(signal.SIGTERM), list[bool]()
    result = play(until(2, lambda: os.kill(os.getpid(), signal.SIGTERM), closed), "run", "demo.toml")
    assert result.exit_code == 4
    assert "stopped after round 2 of 20" in result.stderr
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_session_that_is_stopped_while_it_is_shown_is_closed(
    play: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    def interrupted(event: Event) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("celora.track.progress.line", interrupted)
    assert play(until(99, lambda: None, closed), "run", "demo.toml").exit_code == 4
    assert closed == [True]


def test_stopped_before_the_folder_exists(play: Callable[..., Result]) -> None:
    def script() -> Iterator[Event]:
        raise KeyboardInterrupt
        yield

    result = play(script, "run", "demo.toml")
    assert (result.exit_code, result.stderr) == (4, "stopped before the first round: give the same command again\n")


def test_what_nobody_expected_shows_its_traceback(play: Callable[..., Result]) -> None:
    result = play(until(1, throw(ZeroDivisionError("by 0"))), "run", "demo.toml")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "unexpected ZeroDivisionError: by 0\nto go on: celora resume" in result.stderr
    told = json.loads(play(until(1, throw(ZeroDivisionError("by 0"))), "run", "demo.toml", "--json").stdout)
    assert told["error"]["kind"] == "ZeroDivisionError"


@pytest.mark.parametrize("seeds", ["a", "0,-1", "", "1.5", "²"])
def test_seeds_and_algorithms_are_refused_together(seeds: str, play: Callable[..., Result]) -> None:
    result = play(session, "compare", "demo.toml", "--algorithms", ",", "--seeds", seeds)
    assert result.exit_code == 2
    assert f"--seeds: found {seeds!r}, expected whole numbers from 0 up, such as 0,1,2" in result.stderr
    assert "--algorithms: found ','" in result.stderr
    assert "2 problems. Nothing was run." in result.stderr


def test_wrong_usage_is_2() -> None:
    assert CliRunner().invoke(cli.app, ["run"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["rnu"]).exit_code == 2


# --- what needs no session


def test_version_and_help() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"celora {version('celora')}\n"
    for command in ("run", "compare", "resume", "list"):
        result = CliRunner().invoke(cli.app, [command, "--help"])
        assert result.exit_code == 0
        assert f"celora {command}" in result.stdout
        assert "Exit codes: 0 done" in result.stdout


# --- keys


def test_the_key_that_sites_share_is_made_by_a_command_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "shared.secret"
    result = CliRunner().invoke(cli.app, ["keys", "secret", str(path)])
    assert (result.exit_code, result.stdout.strip()) == (0, str(path))
    secret = keys.read(path)
    again = CliRunner().invoke(cli.app, ["keys", "secret", str(path)])
    assert again.exit_code == 2 and "keys are never overwritten" in again.stderr
    assert keys.read(path) == secret
