"""The commands of one machine: run, compare, resume, export, list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from celora.cli.later import catalog, experiment, exports, output
from celora.cli.options import Config, Group, Json, Out, Quiet, Sets, examples, read
from celora.errors import ConfigError
from celora.exits import SessionState, explained
from celora.experiment.engines import choices
from celora.lazy import all_is_loaded

ENGINE_HELP = f"Where the clients are: {'; '.join(f'{name}, {place}' for name, place in choices().items())}."


def add(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(
        epilog=examples(
            "celora run demo.toml",
            "celora run demo.toml --set algorithm.name=fedsa-lora --set plan.rounds=5 --out runs/short",
            "celora run demo.toml --engine flower-sim --out runs/simulated",
            "celora run demo.toml --json > result.json",
        )
    )(run)
    app.command(
        epilog=examples(
            "celora compare demo.toml --algorithms fedit,fedsa-lora,ce-lora",
            "celora compare demo.toml --algorithms fedsa-lora,ce-lora --seeds 0,1,2 --out runs/table-1",
            "celora compare demo.toml --algorithms fedit,ce-lora --match floats --out runs/equal-uplink",
        )
    )(compare)
    app.command(epilog=examples("celora resume runs/demo"))(resume)
    app.command(
        epilog=examples(
            "celora export runs/demo",
            "celora export runs/demo --client site-a --format merged --out models",
            "celora export runs/comparison/ce-lora --client client-03 --json",
        )
    )(export)
    app.command("list", epilog=examples("celora list", "celora list ce-lora", "celora list --json"))(list_)


def run(
    *,
    config: Config,
    sets: Sets = None,
    group: Group = None,
    engine: Annotated[str, typer.Option(metavar="|".join(choices()), help=ENGINE_HELP)] = "embedded",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the experiment in CONFIG.toml, after its local-only twin of equal budget."""
    output.follow(lambda log: experiment.run(read(config, sets, group), out, engine=engine), as_json, quiet)


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

    def start(log: experiment.Log) -> Iterator[dict[str, Any]]:
        labels, numbers, problems = _words(algorithms), _seeds(seeds), list[str]()
        if not labels:
            problems.append(f"--algorithms: found {algorithms!r}, expected names such as fedit,ce-lora")
        if numbers is None:
            problems.append(f"--seeds: found {seeds!r}, expected whole numbers from 0 up, such as 0,1,2")
        if problems:
            raise ConfigError(problems)
        chosen = read(config, sets, group)
        return experiment.compare(chosen, labels, numbers or [chosen.plan.seed], out, match=match)

    output.follow(start, as_json, quiet)


def resume(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder of run or compare.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue the run or comparison in RUN after its last whole round, as if it had never stopped."""
    output.follow(lambda log: experiment.resume(folder, log), as_json, quiet)


def export(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run that has finished; of a comparison one of its.")],
    client: Annotated[str, typer.Option(metavar="ID|all", help="Whose model.")] = "all",
    format: Annotated[
        str,
        typer.Option(
            metavar="peft|merged",
            help="An adapter for stock peft and vLLM, of a rank that vLLM serves; or a whole transformers checkpoint.",
        ),
    ] = "peft",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where: a folder for each client.", show_default="RUN/exports"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the models that RUN has trained so that others can load them; each is loaded by stock peft and compared."""
    with explained(SessionState(), as_json=as_json):
        written = list[exports.ClientExport]()
        for one in exports.export(folder, client, format, out):
            all_is_loaded()
            written.append(one)
            if not as_json:
                typer.echo(str(one))
        if as_json:
            typer.echo(json.dumps([one.described for one in written], indent=2))
        else:
            output.show_all(*exports.closing(written))


def list_(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="[ALGORITHM]...")] = None,
    as_json: Json = False,
) -> None:
    """The algorithms, what travels and what stays; of those that are named, every setting."""
    with explained(SessionState(), as_json=as_json):
        found = catalog.describe(names or [])
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif names:
        output.show_all(*(part for entry in found for part in catalog.page(entry)))
    else:
        more = "celora list NAME shows its paper, its records and its settings"
        output.show_all(catalog.table(found), more, wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str | None) -> list[int] | None:
    """The seeds: none where the option was not given, and None where it makes no sense."""
    words = _words(text) if text is not None else []
    if text is not None and (not words or not all(word.isascii() and word.isdecimal() for word in words)):
        return None
    return [int(word) for word in words]
