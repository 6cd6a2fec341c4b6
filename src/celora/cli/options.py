"""The options that commands share, and the examples at the end of their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from celora.cli.later import experiment
from celora.exits import CODES

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
