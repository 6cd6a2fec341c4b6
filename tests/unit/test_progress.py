"""celora.track.progress: lines for a log and bars for a terminal, on stderr alone."""

import pytest

from celora.track.progress import line, live_progress
from tests.unit.summaries import round_event, session


def test_lines_tell_of_excluded_clients_and_hold_no_control_codes() -> None:
    text = line(
        round_event(excluded={"site\x1b[31m\n": "no reply within 5 s"}, validation={"personal": None}, lift=None)
    )
    assert text == (
        "2026-11-21T07:12:03Z ce-lora seed 0 round 07/20 up 6.0 KiB 12.4s "
        r"excluded site\x1b[31m\n: no reply within 5 s"
    )


def test_a_resumed_job_says_where_it_starts() -> None:
    start = {**round_event(), "event": "start", "from_round": 7, "clients": 3, "folder": "runs/demo"}
    assert (line(start) or "").endswith("resumed after round 7 of 20 rounds, 3 clients, folder runs/demo")


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with live_progress() as show:
        for event in session():
            show(event)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "ce-lora seed 0" in shown.err
    assert "site-z is left out" in shown.err
    assert "test mean 0.810" in shown.err
