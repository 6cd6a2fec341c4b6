"""What all commands share: options, and following a session's events to its end.

Results go to stdout, progress and errors to stderr; with --json stdout is exactly one JSON value.
"""

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from celora import experiment
from celora.exits import CODES, SessionState, explained
from celora.track import tables
from celora.track.folder import stamped
from celora.track.progress import live_progress

Event = dict[str, Any]

Config = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The experiment.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as train.lr=0.002; repeatable."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="The run folder, a new one.", show_default="runs/<name>"),
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group",
        metavar="K",
        help="Clients whose rows may share a pass, as engine.group; 1: one after another.",
        show_default="many",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, and no progress.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the path of the run folder, and nothing else.")]


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(["Examples:", *(f"  [bold]{line}[/bold]" for line in lines), CODES])


def read(config: Path, sets: list[str] | None, group: int | None = None) -> experiment.Experiment:
    """The experiment in a file, with the changes of the command line."""
    return experiment.read(config, [*(sets or []), *([] if group is None else [f"engine.group={group}"])])


def follow(start: Callable[[experiment.Log], Iterator[Event]], as_json: bool, quiet: bool) -> None:
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
        show_all(tables.compare_table(summaries), *map(Text, lines))
    else:
        last = summaries[-1]
        lines = ["", *tables.next_lines(end["folder"], last)]
        show_all(tables.client_table(last), *tables.client_lines(last), *map(Text, lines))


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
        console.print(part, soft_wrap=isinstance(part, Text))  # a path must stay in one piece
