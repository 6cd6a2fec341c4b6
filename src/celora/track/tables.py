"""Summaries as tables for a terminal; `plain` gives the same as text, without control codes."""

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from celora.track.text import HARMED, MISSING, duration, lift, printable, score, share, size

Summary = Mapping[str, Any]
WIDTH = 120
HARM = "bold red"


def plain(*parts: RenderableType) -> str:
    """The parts as text, at most `WIDTH` columns, without colours."""
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def client_table(summary: Summary) -> Table:
    """A row for each client: its test score alone and federated, and what it gained; losses are marked."""
    of = f"test scores{metric(summary)} of {headline(summary)}"
    table = _table(f"{summary['algorithm']}, seed {summary['seed']}: {of}")
    clients: Mapping[str, Mapping[str, Any]] = summary["clients"]
    baseline = any(row.get("majority") is not None for row in clients.values())
    table.add_column("client", overflow="fold", min_width=8)
    columns = (
        "train\nrows",
        "test\nrows",
        *(["baseline"] if baseline else []),
        "local-\nonly",
        "federated",
    )
    for name in (*columns, "lift", "received", "personal", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    mean_sent = summary["bytes"].get("total", {}).get("up_frame", 0) / max(1, len(clients))
    for client, row in clients.items():
        values = [
            str(row["train"]),
            str(row["test"]),
            *([score(row.get("majority"))] if baseline else []),
            *(score(row[name]) for name in ("local_only", "score")),
            lift(row["lift"]),
            *(score(row[name]) for name in ("received", "personal")),
            size(row.get("up_frame", mean_sent)),
        ]
        style = HARM if row["lift"] is not None and row["lift"] < 0 else ""
        table.add_row(Text(printable(client)), *map(Text, values), style=style)
    return table


def headline(summary: Summary) -> str:
    """Which model the scores are of, and how it was chosen."""
    return f"the {summary['moment']} models of round {summary['round']}, the best on validation"


def metric(summary: Summary) -> str:
    """What the scores are of, after the word "scores"; accuracy goes without saying.

    >>> metric({}), metric({"headline": {"metric": "loss", "higher_is_better": False}})
    ('', ' (loss, lower is better)')
    """
    of = summary.get("headline", {"metric": "accuracy", "higher_is_better": True})
    if of["metric"] == "accuracy":
        return ""
    return f" ({of['metric']})" if of["higher_is_better"] else f" ({of['metric']}, lower is better)"


def client_lines(summary: Summary) -> list[Text]:
    """Beneath the client table: the six numbers, the last round, and the bytes, head and summary apart."""
    m, each = summary["metrics"], summary["bytes"]
    gains = _values(row["lift"] for row in summary["clients"].values())
    harmed = sum(gain < 0 for gain in gains)
    of = f"{harmed} of {len(gains)} clients ({share(m['harmed'])})"
    marked = f", marked {HARMED}" if harmed else ""
    lines = {
        "all clients": f"mean {score(m['mean'])}   by rows {score(m['weighted_mean'])}   "
        f"worst decile {score(m['worst_decile'])}   std {score(m['std'])}   lift {lift(m['lift_mean'])}",
        "harmed": f"{of} are below their local-only twin{marked}",
        **{f"last {name}": _last(summary["rounds"], at["metrics"]) for name, at in summary["last"].items()},
        "bytes up": f"{size(each['up_payload'])} adapter, {size(each['up_frame'])} frame, per client and round",
        "bytes down": f"{size(each['down_payload'])} adapter, {size(each['down_frame'])} frame, the same",
        **_sockets(each),
        "bytes of head": f"{size(each['head'])} up per client and round, not counted in the adapter's",
        "bytes of data": f"{size(each['summary'])} of data summary up per client, each time, not in the adapter's",
    }
    return [
        Text(f"  {name:<15}{text}", style=HARM if name == "harmed" and harmed else "") for name, text in lines.items()
    ]


def _sockets(each: Mapping[str, Any]) -> dict[str, str]:
    """Where there are sockets: what crossed them, TLS, HTTP and polling included."""
    if each.get("up_socket") is None:
        return {}
    return {
        "on sockets": f"{size(each['up_socket'])} up, {size(each['down_socket'])} down, the same, with all overhead"
    }


def _last(rounds: int, m: Mapping[str, float | None]) -> str:
    return f"mean {score(m['mean'])}   worst decile {score(m['worst_decile'])}   (after round {rounds})"


def compare_table(summaries: Sequence[Summary]) -> Table:
    """A row for each algorithm, as given; over several seeds the mean, and beneath it ± the sample std."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(summary["algorithm"], []).append(summary)
    seeds = max((len(group) for group in groups.values()), default=0)
    which = metric(summaries[0]) if summaries else ""
    table = _table(f"test scores{which}" + (f", mean ± std over {seeds} seeds" if seeds > 1 else ""))
    table.add_column("algorithm", overflow="fold", min_width=10)
    matched = any(summary.get("uplink", {}).get("match") == "floats" for summary in summaries)
    scores = ("mean", "worst\ndecile", "harmed", "lift", "of the\nmodels", "received", "personal")
    sending = ("rank", "numbers\nup") if matched else ()
    for name in (*scores, *sending, "adapter\nup", "frame\nup", "head\nup", "data\nsummary", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for algorithm, group in groups.items():
        metrics = [summary["metrics"] for summary in group]
        of = {summary["moment"] for summary in group}
        gains = _values(m["lift_mean"] for m in metrics)
        table.add_row(
            Text(printable(algorithm)),
            _spread(score, (m["mean"] for m in metrics)),
            _spread(score, (m["worst_decile"] for m in metrics)),
            _spread(share, (m["harmed"] for m in metrics)),
            _spread(lift, gains),
            Text(of.pop() if len(of) == 1 else "mixed"),
            *(
                _spread(score, (s["moments"].get(name, {}).get("metrics", {}).get("mean") for s in group))
                for name in ("received", "personal")
            ),
            *(Text(f"{group[0]['uplink'][name]:,.0f}") for name in (("rank", "floats") if matched else ())),
            *(
                Text(size(_mean(_values(s["bytes"][name] for s in group))))
                for name in ("up_payload", "up_frame", "head", "summary")
            ),
            Text(duration(_mean(_values(s["seconds"] for s in group)))),
            style=HARM if gains and statistics.fmean(gains) < 0 else "",
        )
    table.caption = Text(
        "harmed: clients below their local-only twin. received, personal: mean at that moment's best round on "
        "validation. adapter, frame, head: bytes sent per client and round; data: of a data summary, each time."
        + (
            " rank: chosen so that numbers up, of the adapter in a round, are FedIT's or just fewer." if matched else ""
        ),
        justify="left",
    )
    return table


def next_lines(folder: str, summary: Summary | None = None) -> list[str]:
    """Where things are."""
    lines = [f"run folder   {folder}"]
    if summary is not None:
        lines += [f"report       {summary['folder']}/report.html"]
        there = (
            f"{summary['adapters']}/<client>" if summary["adapters"] else "at each site, --state/*/<client>/*/adapter"
        )
        lines += [f"adapters     {there} (the README.md in each says how to load it)"]
    return lines


def _table(title: str) -> Table:
    return Table(
        title=Text(printable(title)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _spread(write: Any, many: Iterable[float | None]) -> Text:
    """The mean, and for several values ± their sample standard deviation on a line of its own."""
    values = _values(many)
    text = Text(write(_mean(values)))
    if len(values) > 1:
        deviation = statistics.stdev(values)
        text.append(f"\n±{share(deviation) if write is share else score(deviation)}", style="dim")
    return text


def _values(many: Iterable[float | None]) -> list[float]:
    return [value for value in many if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


__all__ = [
    "HARMED",
    "MISSING",
    "client_lines",
    "client_table",
    "compare_table",
    "headline",
    "metric",
    "next_lines",
    "plain",
]
