"""The README's picture and table from a comparison: python benchmarks/picture.py runs/demo docs/demo.svg"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = {"local": "#6b7280", "fedit": "#2563eb", "ffa-lora": "#0891b2", "fedsa-lora": "#7c3aed", "ce-lora": "#ea580c"}


def draw(summaries: list[dict[str, Any]], target: Path) -> None:
    """What each client scores against what it sends: one column of dots a method, its mean as a bar."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for place, summary in enumerate(summaries):
        size, colour = summary["bytes"], COLOURS.get(summary["algorithm"], "#111827")
        scores = [row["score"] for row in summary["clients"].values()]
        worse = [row["lift"] < 0 for row in summary["clients"].values()]
        spread = [place + 0.24 * (i / max(1, len(scores) - 1) - 0.5) for i in range(len(scores))]
        faces = ["none" if below else colour for below in worse]
        axes.scatter(spread, scores, s=34, facecolors=faces, edgecolors=colour, linewidths=1.3, zorder=3)
        axes.hlines(summary["metrics"]["mean"], place - 0.3, place + 0.3, color=colour, linewidth=3)
        sent = (size["up_payload"] + size["head"]) / 1024
        label = (
            f"{summary['algorithm']}\n{sent:,.0f} KiB up a round" if sent else f"{summary['algorithm']}\nnothing sent"
        )
        axes.text(place, -0.02, label, ha="center", va="top", fontsize=9, transform=axes.get_xaxis_transform())
    axes.set(
        xticks=[], ylabel="test accuracy", title="Each dot is a client; hollow: worse than training alone; bar: mean"
    )
    axes.title.set_fontsize(10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})


def table(summaries: list[dict[str, Any]]) -> str:
    """The same numbers as Markdown."""
    lines = [
        "| method | mean | worst decile | lift over alone | clients harmed | adapter up (B) | head up (B) | moment |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for summary in summaries:
        m, size = summary["metrics"], summary["bytes"]
        gain = "–" if summary["algorithm"] == "local" else f"{m['lift_mean']:+.3f}"
        lines.append(
            f"| {summary['algorithm']} | {m['mean']:.3f} | {m['worst_decile']:.3f} | {gain} | {m['harmed']:.0%} | "
            f"{size['up_payload']:,} | {size['head']:,} | {summary['moment']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = json.loads((Path(sys.argv[1]) / "compare.json").read_text())
    draw(found, Path(sys.argv[2]))
    print(table(found))
