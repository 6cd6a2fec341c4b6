"""`report.html`: one page that needs no network and no script; every text from outside is escaped."""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from celora.core.algorithm import Mixing
from celora.track.figures import curves, heat_map, inline
from celora.track.tables import headline, metric
from celora.track.text import HARMED, MISSING, duration, lift, printable, score, share, size

Event = Mapping[str, Any]
Row = Sequence[object]
EVEN = 0.01
"""Shares that differ by less are called equal."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #d0d7de }
table { border-collapse: collapse }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #eaeef2 }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
tr.harmed { background: #ffebe9; color: #a40e26 }
.number { font-size: 2rem }
.note { color: #57606a }
.warn { color: #a40e26; font-weight: 600 }
img { max-width: 100% }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for this page: nothing but what is in it."""


def write(
    folder: Path,
    summary: Mapping[str, Any],
    events: Sequence[Event],
    mixing: Mixing | None,
) -> None:
    """Write `folder/report.html`, whole or not at all.

    Args:
        summary: summary.json.
        events: the journal; only the rounds of this algorithm and seed are drawn.
        mixing: who learned from whom; None if all learned the same.
    """
    temporary = folder / "report.html.tmp"
    temporary.write_text(page(summary, events, mixing), encoding="utf-8")
    os.replace(temporary, folder / "report.html")


def page(
    summary: Mapping[str, Any],
    events: Sequence[Event],
    mixing: Mixing | None,
) -> str:
    """The report as HTML."""
    name = f"{summary['algorithm']}, seed {summary['seed']}"
    parts = [
        f"<h1>{_text(name)}</h1>",
        _headline(summary),
        "<h2>Clients</h2>",
        _clients(summary),
        "<h2>Validation, round by round</h2>",
        inline(curves(summary, events), "validation scores"),
        '<p class="note">What is received in round t is the aggregate of round t − 1 and drawn there.</p>',
        "<h2>Bytes</h2>",
        _bytes(summary),
    ]
    if mixing is not None and len(mixing.clients) > 1:
        learned = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences(mixing))
        parts += ["<h2>Who learned from whom</h2>"]
        if mixing.neighbours is None:
            parts += [inline(heat_map(mixing.weights.numpy(), mixing.clients), "averaging weights")]
        parts += [f'<p class="note">Averaging weights of the last round of training.</p><ul>{learned}</ul>']
    parts += _remarks(summary)
    settings = json.dumps(summary.get("settings", {}), indent=2, ensure_ascii=False)
    parts += ["<h2>Settings</h2>", f"<pre>{escape(settings)}</pre>"]
    head = f'<meta charset="utf-8"><title>{_text(name)}</title><style>{STYLE}</style>'
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{policy}{head}</head>\n<body>\n{body}\n</body></html>\n'


def sentences(mixing: Mixing) -> list[str]:
    """Each row of the averaging weights in words.

    >>> import torch
    >>> weights = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    >>> print(*sentences(Mixing(("a", "b", "c"), weights)), sep="\\n")
    a kept 70 % of its own and learned most from b (30 %).
    b kept 20 % of its own and learned most from c (70 %).
    c kept 0 % of its own and learned most from a (100 %).
    """
    told, clients = [], mixing.clients
    everybody = list(range(len(clients)))
    for i, row in enumerate(mixing.weights.tolist()):
        among = everybody if mixing.neighbours is None else mixing.neighbours[i].tolist()
        others = dict(zip(among, row, strict=True))
        kept = f"{clients[i]} kept {share(others.pop(i, 0.0))} of its own"
        if sum(others.values()) <= EVEN:
            told.append(f"{kept} and was left alone.")
        elif len(others) > 1 and max(others.values()) - min(others.values()) < EVEN:
            group = "all others" if len(others) == len(clients) - 1 else f"{len(others)} others"
            told.append(f"{kept} and learned from {group} alike.")
        else:
            most = max(others, key=lambda other: others[other])
            told.append(f"{kept} and learned most from {clients[most]} ({share(others[most])}).")
    return told


def _headline(summary: Mapping[str, Any]) -> str:
    m = summary["metrics"]
    numbers = f'<span class="number">{score(m["mean"])}</span> mean test score{_text(metric(summary))}'
    if m["lift_mean"] is not None:
        numbers += f', <span class="number">{lift(m["lift_mean"])}</span> over training alone'
    gains = [row["lift"] for row in summary["clients"].values() if row["lift"] is not None]
    harmed = sum(gain < 0 for gain in gains)
    style = "warn" if harmed else "note"
    return (
        f"<p>{numbers}</p>"
        f'<p class="note">Of {_text(headline(summary))}: one choice for all clients, never made on test.</p>'
        f'<p class="{style}">{harmed} of {len(gains)} clients are below their local-only twin.</p>'
        f"<p>Weighted by rows {score(m['weighted_mean'])}, worst decile {score(m['worst_decile'])}, "
        f"standard deviation between clients {score(m['std'])}; {summary['rounds']} rounds in "
        f"{duration(summary['seconds'])}, peak memory {summary['peak_rss_mb']:.0f} MB.</p>"
    )


def _clients(summary: Mapping[str, Any]) -> str:
    header = ("client", "train rows", "test rows", "baseline", "local-only", "federated", "lift")
    rows, harmed = [], []
    for client, c in summary["clients"].items():
        alone = (c["train"], c["test"], score(c.get("majority")), score(c["local_only"]))
        moments = (score(c["received"]), score(c["personal"]))
        rows.append((client, *alone, score(c["score"]), lift(c["lift"]), *moments))
        harmed.append(c["lift"] is not None and c["lift"] < 0)
    note = f'<p class="note">{HARMED} and red: below the local-only twin of equal budget.</p>'
    ends = [
        (f"{moment}, round {best['round']} (best on validation)", *_four(best["metrics"]))
        for moment, best in summary["moments"].items()
    ]
    ends += [(f"{moment}, last round", *_four(at["metrics"])) for moment, at in summary["last"].items()]
    whole = _table(("all clients", "mean", "worst decile", "lift", "harmed"), ends)
    return _table((*header, "received", "personal"), rows, harmed) + (note if any(harmed) else "<p></p>") + whole


def _four(m: Mapping[str, Any]) -> tuple[str, ...]:
    return score(m["mean"]), score(m["worst_decile"]), lift(m["lift_mean"]), share(m["harmed"])


def _bytes(summary: Mapping[str, Any]) -> str:
    each = summary["bytes"]
    total = each.get("total", {})
    lines = {
        "up_payload": "adapter, up",
        "up_frame": "whole frames, up",
        "down_payload": "adapter, down",
        "down_frame": "whole frames, down",
        "head": "head, up (not in the adapter's)",
    }
    rows = [(text, size(each[key]), size(total.get(key))) for key, text in lines.items()]
    asked = f"{size(each['summary'])}, each time"
    rows.append(("data summary, up (not in the adapter's)", asked, size(total.get("summary"))))
    return _table(("measured", "per client and round", "whole run, all clients"), rows)


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    """Who was left out, when a reply was not used, and what else there is to know."""
    replies = [
        f"round {index}: {client}: {why}"
        for index, reasons in summary.get("excluded_replies", {}).items()
        for client, why in reasons.items()
    ]
    blocks = {
        "Clients left out": [f"{client}: {why}" for client, why in summary["excluded"].items()],
        "Replies that were not used": replies,
        "Notices": summary["notices"],
    }
    return [
        f"<h2>{title}</h2><ul>{''.join(f'<li>{_text(text)}</li>' for text in texts)}</ul>"
        for title, texts in blocks.items()
        if texts
    ]


def _table(header: Sequence[str], rows: Sequence[Row], marked: Sequence[bool] = ()) -> str:
    def cells(row: Row, tag: str) -> str:
        return "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row)

    flags = marked or [False] * len(rows)
    body = "".join(
        f'<tr class="harmed">{cells(row, "td")}</tr>' if flag else f"<tr>{cells(row, 'td')}</tr>"
        for row, flag in zip(rows, flags, strict=True)
    )
    return f"<table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return MISSING if value is None else escape(printable(value))
