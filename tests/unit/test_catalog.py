"""celora.catalog: what `celora list` says is what the algorithms are."""

import json

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from celora import catalog, cli
from celora.algorithms import ALGORITHMS
from celora.track import tables


def test_list_says_of_every_algorithm_what_travels_and_what_stays() -> None:
    result = CliRunner().invoke(cli.app, ["list", "--json"])
    entries = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert list(entries) == list(ALGORITHMS)
    assert (entries["ce-lora"]["travels"], entries["ce-lora"]["stays"]) == (["C"], ["A", "B", "head"])
    assert (entries["fedit"]["travels"], entries["fedit"]["stays"]) == (["A", "B", "head"], [])
    assert entries["local"]["travels"] == []
    info = ALGORITHMS["ce-lora"].info
    for field in ("trains", "sends", "gets", "keeps", "remembers", "uplink", "mixed_ranks", "partial"):
        assert entries["ce-lora"][field] == getattr(info, field)
    rule = next(field for field in entries["ce-lora"]["settings"] if field["name"] == "rule")
    assert rule["default"] == "similarity"
    assert rule["allowed"] == "similarity, uniform, reset, permuted"
    share = next(field for field in entries["ce-lora"]["settings"] if field["name"] == "data_share")
    assert share["allowed"] == "number ≥ 0 and ≤ 1"


def test_the_table_says_what_goes_up_and_how_many_numbers_within_120_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(cli.app, ["list"]).stdout
    lines = {line.split("  ")[0].removesuffix(f" {catalog.MIXED}").strip(): line for line in text.splitlines()}
    assert set(ALGORITHMS) <= set(lines)
    assert "A, B, head" in lines["fedit"] and lines["fedit"].rstrip().endswith("r(d + k)")
    assert "C; G once" in lines["ce-lora"] and "every C_i" in lines["ce-lora"]
    assert max(map(cell_len, text.splitlines())) <= tables.WIDTH and "…" not in text


def test_algorithms_with_ranks_of_their_own_are_marked() -> None:
    one = {**catalog.describe(["fedit"])[0], "mixed_ranks": False}
    own = {**one, "mixed_ranks": True}
    without, marked = tables.plain(catalog.table([one])), tables.plain(catalog.table([own]))
    assert "fedit *" not in without and "adapter.ranks" not in without
    assert "fedit *" in marked and "* clients may have ranks of their own" in marked
    assert "each client may have its own (adapter.ranks)" in tables.plain(*catalog.page(own))


def test_list_of_one_shows_its_paper_and_settings() -> None:
    text = CliRunner().invoke(cli.app, ["list", "ce-lora"]).stdout
    assert "arxiv.org/abs/2503.23869" in text
    assert "algorithm.min_rows" in text
    assert "C; G once; numbers a layer and round" in text and "): r²" in text
    assert "nothing" in CliRunner().invoke(cli.app, ["list"]).stdout


def test_list_of_an_unknown_name_has_a_suggestion() -> None:
    result = CliRunner().invoke(cli.app, ["list", "ce-lroa", "xyz"])
    assert result.exit_code == 2
    assert "Did you mean 'ce-lora'?" in result.stderr
    assert "expected one of 'local', 'fedit'" in result.stderr
