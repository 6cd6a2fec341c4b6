"""The command line."""

import atexit
import gc
import io
import sys
from typing import Annotated

import typer

import celora
from celora.cli import runs, sites
from celora.exits import CODES

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # its tracebacks print local variables, which may be somebody's rows
    help="Fine-tune one frozen foundation model for many clients whose data may not leave them.",
    epilog=f"{CODES}\n\nBegin with: [bold]celora list[/bold], [bold]celora run --help[/bold]",
)
runs.add(app)
sites.add(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"celora {celora.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± or ▼ must not end a run
    gc.disable()  # until `all_is_loaded`: it would search what is imported, in vain, a fifth of the time
    atexit.register(gc.freeze)  # else the interpreter searches all that torch and Flower have left: seconds, at the end
    app(prog_name="celora")
