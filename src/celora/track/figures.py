"""The figures of a report; each is a matplotlib `Figure` of its own, without pyplot and its global state."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from celora.lazy import Lazy, np
from celora.track.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

matplotlib_figure, matplotlib_ticker = Lazy("matplotlib.figure"), Lazy("matplotlib.ticker")
NAMED = 40
"""Heat-maps of more clients than this have no names along their sides."""
CELLS = 400
"""Heat-maps of more clients than this show means of neighbours: more cannot be seen, and costs memory."""


def curves(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean and worst validation score at both moments, against the round whose model it is."""
    rounds = {
        e["index"]: e  # a round that was repeated after a resume counts once
        for e in events
        if e["event"] == "round" and (e["algorithm"], e["seed"]) == (summary["algorithm"], summary["seed"])
    }
    figure: Figure = matplotlib_figure.Figure(figsize=(7.5, 3.4), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    for moment, colour, shift in (("personal", "#0969da", 0), ("received", "#bf5700", 1)):
        points = [(i - shift, v) for i, e in sorted(rounds.items()) if (v := e["validation"].get(moment))]
        at = [index for index, _ in points]
        mean, worst = ([v[name] for _, v in points] for name in ("mean", "worst"))
        axes.plot(at, mean, color=colour, marker=".", label=f"{moment}, mean")
        axes.plot(at, worst, color=colour, linestyle=":", label=f"{moment}, worst client")
    axes.axvline(summary["round"], color="#57606a", linewidth=0.8, linestyle="--", label="chosen round")
    axes.set(xlabel="round", ylabel="validation score")
    axes.xaxis.set_major_locator(matplotlib_ticker.MaxNLocator(integer=True))
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def heat_map(similarity: np.ndarray[Any, Any], clients: Sequence[str]) -> Figure:
    """The averaging weights: row i is what client i receives."""
    m = len(clients)
    side = min(8.0, 2.5 + 0.3 * m)
    figure: Figure = matplotlib_figure.Figure(figsize=(side + 0.8, side), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    first = np.arange(0, m, -(-m // CELLS))
    size = np.diff(first, append=m)
    blocks = np.add.reduceat(np.add.reduceat(similarity, first, axis=0), first, axis=1) / np.outer(size, size)
    image = axes.imshow(blocks.astype(np.float32), cmap="Blues", vmin=0.0, extent=(-0.5, m - 0.5, m - 0.5, -0.5))
    axes.set(xlabel="… from", ylabel="receives …")
    if m <= NAMED:
        names = [printable(client)[:24] for client in clients]
        axes.set_xticks(range(m), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(m), names, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share")
    return figure


def inline(figure: Figure, alternative: str) -> str:
    """A figure as an HTML image that holds its own pixels."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a client's name may hold signs that the font does not have
        figure.savefig(stream, format="png")
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f'<p><img alt="{escape(alternative)}" src="data:image/png;base64,{encoded}"></p>'
