"""The command line: reads arguments, follows the events of a session, and prints what came of it.

Results go to stdout, progress and errors to stderr; with --json stdout is exactly one JSON value.
"""

import io
import json
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from celora import catalog, experiment
from celora.errors import ConfigError
from celora.exits import CODES, Session, explained
from celora.track import tables
from celora.track.progress import screen

Event = dict[str, Any]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # its tracebacks print local variables, which may be somebody's rows
    help="Fine-tune one frozen foundation model for many clients whose data may not leave them.",
    epilog=f"{CODES}\n\nBegin with: [bold]celora list[/bold], [bold]celora run --help[/bold]",
)

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


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  [bold]{line}[/bold]" for line in lines), CODES])


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"celora {version('celora')}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "celora run demo.toml",
        "celora run demo.toml --set algorithm.name=fedsa-lora --set plan.rounds=5 --out runs/short",
        "celora run demo.toml --json > result.json",
    )
)
def run(
    *,
    config: Config,
    sets: Sets = None,
    group: Group = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the experiment in CONFIG.toml, after its local-only twin of equal budget."""
    _follow(lambda: experiment.run(_read(config, sets, group), out), as_json, quiet)


@app.command(
    epilog=_examples(
        "celora compare demo.toml --algorithms fedit,fedsa-lora,ce-lora",
        "celora compare demo.toml --algorithms fedsa-lora,ce-lora --seeds 0,1,2 --out runs/table-1",
        "celora compare demo.toml --algorithms fedit,ce-lora --match floats --out runs/equal-uplink",
    )
)
def compare(
    *,
    config: Config,
    algorithms: Annotated[
        str, typer.Option(metavar="A,B,…", help="Names, or labels of the overrides; local is added.")
    ],
    seeds: Annotated[str | None, typer.Option(metavar="0,1,…", help="Whole numbers.", show_default="plan.seed")] = None,
    match: Annotated[
        str,
        typer.Option(
            metavar="rank|floats",
            help="One rank for all; or for each algorithm the rank at which it sends as much as fedit, or just less.",
        ),
    ] = "rank",
    sets: Sets = None,
    group: Group = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run several algorithms on the clients of CONFIG.toml, with every seed, and put them into one table."""

    def start() -> Iterator[Event]:
        labels, numbers, problems = _words(algorithms), _seeds(seeds), list[str]()
        if not labels:
            problems.append(f"--algorithms: found {algorithms!r}, expected names such as fedit,ce-lora")
        if numbers is None:
            problems.append(f"--seeds: found {seeds!r}, expected whole numbers from 0 up, such as 0,1,2")
        if problems:
            raise ConfigError(problems)
        chosen = _read(config, sets, group)
        return experiment.compare(chosen, labels, numbers or [chosen.plan.seed], out, match=match)

    _follow(start, as_json, quiet)


def _read(config: Path, sets: list[str] | None, group: int | None) -> experiment.Experiment:
    return experiment.read(config, [*(sets or []), *([] if group is None else [f"engine.group={group}"])])


@app.command(epilog=_examples("celora resume runs/demo"))
def resume(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder of run or compare.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue the run or comparison in RUN after its last whole round, as if it had never stopped."""
    _follow(lambda: experiment.resume(folder), as_json, quiet)


@app.command("list", epilog=_examples("celora list", "celora list ce-lora", "celora list --json"))
def list_(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="[ALGORITHM]...")] = None,
    as_json: Json = False,
) -> None:
    """The algorithms, what travels and what stays; of those that are named, every setting."""
    with explained(Session(), as_json=as_json):
        found = catalog.describe(names or [])
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif names:
        _print(*(part for entry in found for part in catalog.page(entry)))
    else:
        _print(catalog.table(found), Text("celora list NAME shows its paper, its records and its settings"), wrap=True)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± or ▼ must not end a run
    app(prog_name="celora")


def _follow(start: Callable[[], Iterator[Event]], as_json: bool, quiet: bool) -> None:
    """Show a session's events as they come, then what came of it."""
    session, kind, end = Session(), "run", dict[str, Any]()
    with (
        explained(session, as_json=as_json),
        screen(quiet=quiet or as_json) as show,
        closing(_events(start())) as events,
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
        _print(tables.compare_table(summaries), *map(Text, lines))
    else:
        last = summaries[-1]
        lines = ["", *tables.next_lines(end["folder"], last)]
        _print(tables.client_table(last), *tables.client_lines(last), *map(Text, lines))


def _events(source: Iterator[Event]) -> Generator[Event, None, None]:
    """The same events; closing this closes their source, and with it the journal and the folder's lock."""
    yield from source


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str | None) -> list[int] | None:
    """The seeds: none where the option was not given, and None where it makes no sense."""
    words = _words(text) if text is not None else []
    if text is not None and (not words or not all(word.isascii() and word.isdecimal() for word in words)):
        return None
    return [int(word) for word in words]


def _print(*parts: RenderableType, wrap: bool = False) -> None:
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
