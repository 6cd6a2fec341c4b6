"""celora.track.tables: what a reader must be able to see, with and without colours, within 120 columns."""

import io
import re

import pytest
from rich.console import Console, RenderableType

from celora.track.tables import WIDTH, client_lines, client_table, compare_table, next_lines, plain
from tests.unit.summaries import summary


def coloured(part: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, force_terminal=True, color_system="standard", legacy_windows=False).print(part)
    return stream.getvalue()


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line and not line.startswith("ce-lora, seed"))


def test_a_harmed_client_is_marked_and_red_and_no_other_is() -> None:
    text, colours = plain(client_table(summary())), coloured(client_table(summary()))
    assert "▼ -0.020" in row(text, "site-b")
    assert "\x1b[1;31m" in row(colours, "site-b")
    for client in ("site-a", "site-c"):
        assert "▼" not in row(text, client)
        assert "\x1b[1;31m" not in row(colours, client)


def test_the_client_row_holds_rows_twin_score_lift_moments_and_bytes() -> None:
    assert row(plain(client_table(summary())), "site-a").split() == [
        "site-a", "1200", "300", "0.550", "0.800", "0.850", "+0.050", "0.790", "0.850", "122.1", "KiB"
    ]  # fmt: skip


def test_bytes_of_one_client_are_its_own_where_they_are_known() -> None:
    told = summary()
    told["clients"]["site-a"]["up_frame"] = 2048
    assert "2.0 KiB" in row(plain(client_table(told)), "site-a")


def test_the_lines_beneath_keep_head_and_summary_apart_and_count_the_harmed() -> None:
    text = plain(*client_lines(summary()))
    assert "1 of 3 clients (33 %) are below their local-only twin" in text
    assert re.search(r"bytes up +6\.0 KiB adapter, 6\.1 KiB frame", text)
    assert re.search(r"bytes of head +2\.3 MiB", text)
    assert re.search(r"bytes of data +36\.0 KiB", text)
    assert re.search(r"last received +mean 0\.770", text)


def test_missing_scores_are_dashes() -> None:
    told = summary()
    told["clients"]["site-a"] |= dict.fromkeys(("score", "local_only", "lift", "received", "personal", "majority"))
    assert row(plain(client_table(told)), "site-a").count("–") == 6


def test_names_cannot_colour_the_terminal_or_speak_markup() -> None:
    told = summary()
    told["clients"] = {"[red]x\x1b[31m": told["clients"]["site-a"]}
    assert r"[red]x\x1b[31m" in plain(client_table(told))


def test_algorithms_keep_their_order_and_no_number_is_cut_within_the_width() -> None:
    text = plain(compare_table([summary("local"), summary("fedsa-lora"), summary("ce-lora")]))
    assert [line.split()[0] for line in text.splitlines() if "20m" in line or "2m41s" in line] == [
        "local", "fedsa-lora", "ce-lora"
    ]  # fmt: skip
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text
    for value in ("0.810", "0.740", "33 %", "+0.010", "0.790", "6.0 KiB", "6.1 KiB", "2.3 MiB", "36.0 KiB", "2m41s"):
        assert value in row(text, "fedsa-lora")


def test_seeds_become_a_mean_and_a_sample_deviation() -> None:
    text = plain(compare_table([summary(mean=0.80), summary("local"), summary(seed=1, mean=0.84), summary("local", 1)]))
    assert "mean ± std over 2 seeds" in text
    lines = text.splitlines()
    at = next(i for i, shown in enumerate(lines) if "ce-lora" in shown)
    first, second = lines[at : at + 2]
    assert first.split()[1] == "0.820"
    assert second.split()[0] == "±0.028"


def test_a_method_that_loses_to_local_training_is_red_and_marked() -> None:
    worse = summary()
    worse["metrics"]["lift_mean"] = -0.01
    assert "▼ -0.010" in row(plain(compare_table([worse])), "ce-lora")
    assert "\x1b[1;31m" in row(coloured(compare_table([worse])), "ce-lora")


def test_rank_and_numbers_sent_are_shown_where_budgets_are_matched() -> None:
    uplink = {"match": "floats", "rank": 110, "floats": 145200, "budget": 147456.0}
    stream = io.StringIO()
    shown = compare_table([summary("local", uplink={**uplink, "floats": 0}), summary(uplink=uplink)])
    Console(file=stream, width=150).print(shown)  # the command line prints a table as wide as it is
    text = stream.getvalue()
    assert "numbers" in text and "rank: chosen so that" in text
    assert row(text, "ce-lora").split()[9:11] == ["110", "145,200"]
    for uplinks in ({}, {"uplink": {**uplink, "match": "rank"}}):
        assert "numbers" not in plain(compare_table([summary(**uplinks)]))


@pytest.mark.parametrize("moments", [["personal", "received"], ["personal", "personal"]])
def test_the_headline_moment_is_said_or_said_to_differ(moments: list[str]) -> None:
    text = plain(compare_table([summary(moment=moments[0]), summary(seed=1, moment=moments[1])]))
    assert ("mixed" in row(text, "ce-lora")) == (len(set(moments)) == 2)


def test_next_lines_name_the_folder_the_report_and_the_adapters() -> None:
    text = "\n".join(next_lines("runs/demo", summary()))
    assert all(path in text for path in ("runs/demo", "runs/demo/report.html", "runs/demo/adapters/"))
    text = "\n".join(next_lines("runs/demo", {**summary(), "adapters": None}))
    assert "at each site, --state/*/<client>/*/adapter" in text and "runs/demo/adapters" not in text
