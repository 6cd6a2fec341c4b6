"""What commands print: a session's events to its end, tables, lines.

Results go to stdout, progress and errors to stderr; with --json stdout is exactly one JSON value.
"""

import json
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from celora.exits import SessionState, explained
from celora.lazy import all_is_loaded
from celora.site.ledger import Entry
from celora.track import tables
from celora.track.folder import stamped
from celora.track.progress import live_progress
from celora.track.text import printable

Event = dict[str, Any]
Log = Callable[[str], None]


def follow(start: Callable[[Log], Iterator[Event]], as_json: bool, quiet: bool) -> None:
    """Show a session's events as they come, then what came of it.

    Args:
        start: given whom to tell what happens between two events.
    """
    session, kind, end = SessionState(), "run", dict[str, Any]()
    with (
        explained(session, as_json=as_json),
        live_progress(quiet=quiet or as_json) as show,
        closing(_events(start(lambda text: show(stamped({"event": "said", "text": text}))))) as events,
    ):
        for event in events:
            all_is_loaded()
            session.note(event)
            show(event)
            if event["event"] == "session":
                kind = event["kind"]
            elif event["event"] == "session_end":
                end = event
    summaries = end["summaries"]
    if as_json:
        typer.echo(json.dumps(summaries if kind == "compare" else summaries[-1], indent=2))
    elif quiet:
        typer.echo(end["folder"])
    elif kind == "compare":
        adapters = [f"adapters     {summary['adapters']}/<client>" for summary in summaries]
        lines = ["", *tables.next_lines(end["folder"]), f"comparison   {end['compare']}", *adapters]
        show_all(tables.compare_table(summaries), *lines)
    else:
        last = summaries[-1]
        lines = ["", *tables.next_lines(end["folder"], last)]
        show_all(tables.client_table(last), *tables.client_lines(last), *lines)


def _events(source: Iterator[Event]) -> Generator[Event, None, None]:
    """The same events; closing this closes their source, and with it the journal and the folder's lock."""
    yield from source


def show_all(*parts: RenderableType, wrap: bool = False) -> None:
    """To stdout, as wide as the tables need: a narrow terminal wraps lines rather than cut numbers.

    Args:
        wrap: whether cells may wrap instead, for tables of words.
    """
    wide = Console(width=1000)
    needed = [
        Measurement.get(wide, wide.options, part).maximum for part in parts if isinstance(part, Table) and not wrap
    ]
    width = max(tables.WIDTH, shutil.get_terminal_size().columns, *needed)
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str | Text))  # a path must stay in one piece


def ledger_table(entries: Sequence[Entry]) -> Table:
    """A row for each frame that left, and what they come to."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=True)
    total = f"{sum(entry.bytes for entry in entries):,}"
    table.add_column("time", footer=f"{len(entries)} frames")
    for name in ("federation", "job", "client"):
        table.add_column(name, overflow="fold")
    table.add_column("round", justify="right")
    table.add_column("kind", overflow="fold")
    table.add_column("bytes", justify="right", footer=total)
    table.add_column("SHA-256")
    for e in entries:
        cells = (e.time, e.federation, e.job, e.client, str(e.round), e.kind, f"{e.bytes:,}", e.sha256[:16])
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
