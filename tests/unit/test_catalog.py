"""celora.catalog: what `celora list` says is what the algorithms are."""

import json

from typer.testing import CliRunner

from celora import cli
from celora.algorithms import ALGORITHMS


def test_list_says_of_every_algorithm_what_travels_and_what_stays() -> None:
    result = CliRunner().invoke(cli.app, ["list", "--json"])
    entries = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert list(entries) == list(ALGORITHMS)
    assert (entries["ce-lora"]["travels"], entries["ce-lora"]["stays"]) == (["C"], ["A", "B", "head"])
    assert (entries["fedit"]["travels"], entries["fedit"]["stays"]) == (["A", "B", "head"], [])
    assert entries["local"]["travels"] == []
    rule = next(field for field in entries["ce-lora"]["settings"] if field["name"] == "rule")
    assert rule["default"] == "similarity"
    assert rule["allowed"] == "similarity, uniform, reset, permuted"
    share = next(field for field in entries["ce-lora"]["settings"] if field["name"] == "data_share")
    assert share["allowed"] == "number ≥ 0 and ≤ 1"


def test_list_of_one_shows_its_paper_and_settings() -> None:
    text = CliRunner().invoke(cli.app, ["list", "ce-lora"]).stdout
    assert "arxiv.org/abs/2503.23869" in text
    assert "algorithm.min_rows" in text
    assert "nothing" in CliRunner().invoke(cli.app, ["list"]).stdout


def test_list_of_an_unknown_name_has_a_suggestion() -> None:
    result = CliRunner().invoke(cli.app, ["list", "ce-lroa", "xyz"])
    assert result.exit_code == 2
    assert "Did you mean 'ce-lora'?" in result.stderr
    assert "expected one of local, fedit" in result.stderr
