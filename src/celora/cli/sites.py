"""The commands of a federation of real sites: server, site, keys."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from celora.cli import later
from celora.cli.later import experiment, output
from celora.cli.options import Config, Json, Out, Quiet, Sets, examples, read
from celora.errors import ConfigError
from celora.exits import SessionState, explained
from celora.lazy import all_is_loaded
from celora.track.text import printable

Secret = Annotated[
    Path | None,
    typer.Option("--secret", metavar="FILE", help="The sites' own key, where the algorithm encrypts."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without TLS and keys; only on this machine (127.0.0.1), to try things out.")
]
Keys = Annotated[Path | None, typer.Option("--keys", metavar="FOLDER", help="The site's: site.key and ca.crt.")]
Server = Annotated[str | None, typer.Option("--server", metavar="HOST:PORT", help="The server.")]
State = Annotated[
    Path | None, typer.Option("--state", metavar="FOLDER", help="Private state and the ledger; its owner's only.")
]
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help="Its rows: .csv, .jsonl or .parquet.")]
Test = Annotated[Path | None, typer.Option("--test", metavar="FILE", help="Its test rows, where data.test is set.")]
Policy = Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="What this site lets leave (TOML).")]
Name = Annotated[str | None, typer.Option("--name", help="The client's name; with keys the server knows it.")]
Backbone = Annotated[
    str | None, typer.Option("--backbone", metavar="FOLDER", help="Where the backbone is here, if elsewhere.")
]


def add(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(
        epilog=examples(
            "celora keys dev --out keys --sites site-a,site-b,site-c --host server.example",
            "celora server CONFIG.toml --listen 0.0.0.0:8000 --keys keys",
            "celora resume runs/NAME",
        )
    )(server)
    sites = typer.Typer(
        invoke_without_command=True,
        help="Take part in a federation with this machine's rows; nothing but what the policy allows leaves.",
        epilog=examples(
            "celora site check --data notes.csv --state state --server server.example:8000 --keys keys/site-a",
            "celora site --data notes.csv --state state --server server.example:8000 --keys keys/site-a",
            "celora site ledger --state state",
        ),
    )
    sites.callback()(site)
    sites.command("check", epilog=examples("celora site check --data notes.csv --state state --server …"))(check)
    sites.command(
        "ledger", epilog=examples("celora site ledger --state state", "celora site ledger --state state --json")
    )(ledger)
    app.add_typer(sites, name="site")
    made = typer.Typer(no_args_is_help=True, help="Make keys and certificates.")
    made.command("dev", epilog=examples("celora keys dev --out keys --sites site-a,site-b --host 127.0.0.1"))(dev)
    made.command("site", epilog=examples("celora keys site --out keys --name site-a"))(own)
    made.command("secret", epilog=examples("celora keys secret shared.secret"))(secret)
    app.add_typer(made, name="keys")


def server(
    *,
    config: Config,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:8000",
    keys: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="server.crt, server.key and sites/<client>.pub.")
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(metavar="A,B,…|N", help="Whom to wait for, or how many.", show_default="all that have a key"),
    ] = None,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for them.", min=1)] = 600.0,
    insecure: Insecure = False,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the experiment in CONFIG.toml with sites that connect to this server; it needs none of their rows."""

    def start(log: experiment.Log) -> Any:
        if (keys is None) != insecure:
            raise ConfigError(["expected either --keys FOLDER (make one with `celora keys dev`), or --insecure"])
        expected: tuple[str, ...] | int | None = None
        if clients is not None:
            words = tuple(word.strip() for word in clients.split(",") if word.strip())
            expected = int(words[0]) if len(words) == 1 and words[0].isdecimal() else words
        if insecure and not expected:
            raise ConfigError(["--clients: with --insecure, say whom to wait for (a,b,c), or how many"])
        engine = later.server.SitesEngine(listen, None if keys is None else str(keys.resolve()), expected, wait)
        return experiment.run(read(config, sets), out, engine=engine, log=log)

    output.follow(start, as_json, quiet)


def site(
    context: typer.Context,
    *,
    data: Data = None,
    state: State = None,
    server: Server = None,
    keys: Keys = None,
    policy: Policy = None,
    name: Name = None,
    test: Test = None,
    backbone: Backbone = None,
    secret: Secret = None,
    once: Annotated[bool, typer.Option("--once", help="End when the server has finished.")] = False,
    insecure: Insecure = False,
) -> None:
    """Take part in a federation with this machine's rows; nothing but what the policy allows leaves."""
    if context.invoked_subcommand is not None:
        return
    with explained(SessionState(), as_json=False), _stopping() as stop:
        os.umask(0o077)  # what this process writes is its owner's
        taking = _join(data, state, server, keys, policy, name, test, backbone, secret, insecure=insecure)
        all_is_loaded()
        later.client.join(taking, stop, _stamped, once=once)


def check(
    *,
    data: Data = None,
    state: State = None,
    server: Server = None,
    keys: Keys = None,
    policy: Policy = None,
    name: Name = None,
    test: Test = None,
    backbone: Backbone = None,
    secret: Secret = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Look at everything that could stand in the way of taking part; exit code 2 if something does."""
    with explained(SessionState(), as_json=as_json):
        findings = later.client.check(
            _join(data, state, server, keys, policy, name, test, backbone, secret, insecure=insecure)
        )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        output.show_all(later.check.report(findings), wrap=True)
    if not later.check.passed(findings):
        raise typer.Exit(2)


def ledger(*, state: State = None, as_json: Json = False) -> None:
    """Every frame that left this site: when, in which round, what, how many bytes, and its SHA-256."""
    with explained(SessionState(), as_json=as_json):
        if state is None or not (state / "ledger.jsonl").is_file():
            raise ConfigError(
                [f"--state: found no ledger in {state or 'no folder'}, expected the one of `celora site`"]
            )
        book = later.ledger.Ledger(state / "ledger.jsonl")
        entries, problems = list(book.entries()), book.verify()
    if as_json:
        typer.echo(json.dumps({"frames": [dataclasses.asdict(e) for e in entries], "problems": problems}, indent=2))
    else:
        output.show_all(output.ledger_table(entries), *(problems or ["the chain of lines is whole"]))
    if problems:
        raise typer.Exit(2)


def dev(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")],
    sites: Annotated[str, typer.Option(metavar="A,B,…", help="The sites' names.")],
    host: Annotated[str, typer.Option(metavar="H1,H2,…", help="Names and addresses of the server.")] = "127.0.0.1",
    days: Annotated[int, typer.Option(help="Until the certificates expire.")] = 365,
) -> None:
    """A development CA, a server certificate and a key pair for each site, in one folder: to try things out."""
    with explained(SessionState(), as_json=False):
        names, hosts = ([word.strip() for word in text.split(",") if word.strip()] for text in (sites, host))
        for path in later.certificates.development(out, names, hosts, days):
            typer.echo(path)


def own(
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where site.key and NAME.pub go.")],
    name: Annotated[str, typer.Option(help="The client's name.")],
) -> None:
    """A site's own key pair: site.key stays there, NAME.pub goes to the server's operator."""
    with explained(SessionState(), as_json=False):
        typer.echo(f"{later.certificates.site_key(out, name)}\n{out / name}.pub")


def secret(
    *,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, for every site and never for the server.")],
) -> None:
    """The key that all sites share where the algorithm encrypts (she-lora); each site names it with --secret."""
    with explained(SessionState(), as_json=False):
        later.keys.make(path)
        typer.echo(path)


def _join(
    data: Path | None,
    state: Path | None,
    server: str | None,
    keys: Path | None,
    policy: Path | None,
    name: str | None,
    test: Path | None,
    backbone: str | None,
    secret: Path | None,
    *,
    insecure: bool,
) -> later.client.Join:
    given = {"--data": data, "--state": state, "--server": server}
    problems = [f"{option}: missing, see `celora site --help`" for option, value in given.items() if value is None]
    if (keys is None) != insecure:
        problems.append("expected either --keys FOLDER (with site.key and ca.crt), or --insecure")
    if insecure and name is None:
        problems.append("--name: with --insecure, say which client this is")
    if problems or data is None or state is None or server is None:
        raise ConfigError(problems)
    return later.client.Join(later.client.SiteData(data, test, backbone, secret), server, state, keys, policy, name)


@contextmanager
def _stopping() -> Any:
    """An event that SIGTERM and Ctrl-C set, so that the site leaves in good order; the second time they interrupt."""
    stop = threading.Event()

    def end(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        _stamped("stopping after what is in hand; once more to stop at once (nothing is lost)")
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stamped(text: str) -> None:
    """A line with the time in UTC, as in the ledger and at the server, on stderr."""
    typer.echo(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {printable(text)}", err=True)
