"""`[[filters]]` in an experiment: read and written like any other section, and the same at every end."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from celora.errors import ConfigError
from celora.experiment.client import SiteData, local
from celora.experiment.config import Experiment, dump, read, resolve, written
from celora.filters import FILTERS, filter_tables, read_filters
from celora.filters.clip import Clip
from celora.filters.quantise import Quantise

BOTH = [{"name": "clip", "norm": 1.0}, {"name": "quantise", "bits": 4}]


def experiment(filters: Any, **more: Any) -> Experiment:
    return resolve({"algorithm": {"name": "fedit"}, "filters": filters, **more}, Path())


def problems(filters: Any, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        experiment(filters, **more)
    return refused.value.problems


def test_filters_are_part_of_the_experiment_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "exp.toml"
    path.write_text('[[filters]]\nname = "clip"\nnorm = 1.0\n[[filters]]\nname = "quantise"\nbits = 4\n')
    assert read(path).filters == experiment(BOTH).filters == (Clip(norm=1.0), Quantise(bits=4))
    assert read(path, ['filters=[{name = "quantise"}]']).filters == (Quantise(bits=8),)


def test_what_is_written_is_read_again_defaults_included() -> None:
    found = experiment([{"name": "quantise"}])
    assert tomllib.loads(dump(found))["filters"] == [{"name": "quantise", "bits": 8}]
    for text in (dump(found), written(found)):
        assert resolve(tomllib.loads(text), Path()).filters == found.filters
    assert "filters" not in tomllib.loads(dump(experiment([])))


@pytest.mark.parametrize("stage", [Clip(norm=0.5), Quantise(bits=4)], ids=repr)
def test_every_filter_is_written_under_the_name_it_is_read_by(stage: Any) -> None:
    assert read_filters(filter_tables((stage,)), []) == (stage,)
    assert type(stage) in FILTERS.values()


def test_a_site_is_sent_the_filters(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("text,label\none,a\ntwo,b\n")
    asked = experiment(BOTH, data={"source": "*.csv"}, model={"backbone": "minilm"})
    assert local(dump(asked), SiteData(tmp_path / "mine.csv")).filters == asked.filters


def test_an_override_replaces_the_filters_of_its_label() -> None:
    overrides = {
        "coarse": {"algorithm": {"name": "fedit"}, "filters": [{"name": "quantise", "bits": 4}]},
        "plain": {"algorithm": {"name": "fedit"}, "filters": []},
    }
    asked = experiment(BOTH, overrides=overrides)
    assert asked.variant("coarse", 0).filters == (Quantise(bits=4),)
    assert asked.variant("plain", 0).filters == ()
    assert asked.variant("local", 0).filters == asked.filters == (Clip(norm=1.0), Quantise(bits=4))


def test_all_mistakes_are_told_at_once() -> None:
    wrong = [
        {"name": "quantize", "bits": 8},
        {"name": "quantise", "bit": 8},
        {"name": "quantise", "bits": 16},
        {"name": "clip"},
        {"norm": 1.0},
        "clip",
    ]
    assert problems(wrong, train={"lr": -1}) == [
        "filters.1.name: found 'quantize', expected 'clip' or 'quantise'. Did you mean 'quantise'?",
        "filters.2.bit: unknown key. Did you mean 'bits'? (allowed: name, bits)",
        "filters.3.bits: found 16, expected 4 or 8",
        "filters.4.norm: missing, expected a value",
        "filters.5.name: missing, expected 'clip' or 'quantise'",
        "filters.6: found 'clip', expected a table",
        "train.lr: found -1, expected greater than 0",
    ]
    assert problems({"name": "clip"}) == [
        "filters: found {'name': 'clip'}, expected tables under [[filters]]"
    ]  # [filters] in place of [[filters]]
    [unknown] = problems([], filter=[])
    assert unknown.startswith("filter: unknown key. Did you mean 'filters'? (allowed: name, data, ")
    assert problems([], overrides={"fedit": {"filters": 3}}) == ["filters: found 3, expected tables under [[filters]]"]


def test_nothing_may_follow_a_filter_that_changes_what_travels() -> None:
    assert problems(BOTH[::-1]) == [
        "filters: found 'clip to norm 1' after 'quantise to 4 bits', which changes what travels; expected 'quantise to "
        "4 bits' at the end"
    ]
