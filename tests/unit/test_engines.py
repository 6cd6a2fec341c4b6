"""celora.experiment.engines: an engine is one file and one line in a table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from celora.cli import app
from celora.errors import ConfigError
from celora.experiment import read, resolve, resume, run
from celora.experiment.embedded import EmbeddedEngine
from celora.experiment.engines import ENGINES, Entry, choices, engine_named, name_of
from celora.experiment.runtimes import Engine
from celora.experiment.server import SitesEngine

LOSSY = '''
"""The embedded engine, on which one client never answers."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

from celora.experiment.embedded import EmbeddedEngine
from celora.experiment.runtimes import Runtime


@dataclass(frozen=True)
class LossyEngine(EmbeddedEngine):
    @contextmanager
    def open(self, session):
        with super().open(session) as runtime:
            yield LossyRuntime(runtime)


@dataclass
class LossyRuntime(Runtime):
    inner: Runtime

    def pool(self, experiment, folder, job, stores):
        pool = self.inner.pool(experiment, folder, job, stores)

        def exchange(instructions):
            return pool.exchange({c: instruction for c, instruction in instructions.items() if c != "client-01"})

        return replace(pool, exchange=exchange)
'''
CONFIG = """
name = "digits"
[data]
source = "digits"
clients = 3
rows = 12
max_validation = 6
max_test = 6
[model]
backbone = "random-vit"
[adapter]
rank = 2
targets = ["q_proj"]
[plan]
rounds = 2
[algorithm]
name = "fedit"
"""


@pytest.fixture
def lossy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in one file of somebody's, and its line in the table."""
    (tmp_path / "lossy_engine.py").write_text(LOSSY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ENGINES, "lossy", Entry("lossy_engine:LossyEngine", "in this process, all but one"))  # type: ignore[arg-type]


def rounds(folder: Path) -> list[Mapping[str, Any]]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


@pytest.mark.parametrize("name", ENGINES)
def test_each_line_of_the_table_leads_to_an_engine_and_back(name: str) -> None:
    kind = ENGINES[name].load()
    assert issubclass(kind, Engine)
    options: dict[str, Any] = {"sites": {"address": "127.0.0.1:0", "keys": None, "clients": 2, "wait": 1.0}}
    assert name_of(kind(**options.get(name, {}))) == name


def test_a_new_engine_is_a_file_and_a_line_and_is_chosen_by_its_name(lossy: None, tmp_path: Path) -> None:
    (tmp_path / "digits.toml").write_text(CONFIG)
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", str(tmp_path / "digits.toml"), "--engine", "lossy", "--out", str(out)])
    assert result.exit_code == 0, result.output
    trained = rounds(out)[:2]
    assert [event["heard"] for event in trained] == [["client-00", "client-02"]] * 2
    assert [event["excluded"] for event in trained] == [{"client-01": "no reply"}] * 2
    assert json.loads((out / "session.json").read_text())["engine"] == {"name": "lossy", "options": {}}


def test_a_run_is_resumed_with_the_engine_that_it_began_with(lossy: None, tmp_path: Path) -> None:
    (tmp_path / "digits.toml").write_text(CONFIG)
    experiment, out = read(tmp_path / "digits.toml"), tmp_path / "run"
    for event in run(experiment, out, twin=False, engine="lossy"):
        if event["event"] == "round":
            break
    *_, last = resume(out)
    assert last["event"] == "session_end"
    assert ["client-01" in event["excluded"] for event in rounds(out)] == [True, True, True]


def test_an_engine_that_is_not_in_the_table_is_refused_with_those_that_are(lossy: None) -> None:
    with pytest.raises(
        ConfigError, match=r"--engine: found 'embeded', expected one of .*lossy\. Did you mean 'embedded'"
    ):
        engine_named("embeded")
    assert list(choices()) == ["embedded", "flower-sim", "lossy"]


def test_an_engine_with_options_is_started_by_its_own_command() -> None:
    with pytest.raises(ConfigError, match="--engine: sites has options of its own: start it with `celora server`"):
        engine_named("sites")


def test_an_engine_of_no_line_cannot_be_resumed_and_is_refused(tmp_path: Path) -> None:
    class Other(EmbeddedEngine):
        """In nobody's table."""

    tree = {"data": {"source": "digits"}, "model": {"backbone": "random-vit"}, "adapter": {"targets": ["q_proj"]}}
    with pytest.raises(ConfigError, match=r"engine: found .*Other, expected one that has a line in .*ENGINES"):
        list(run(resolve(tree, tmp_path), tmp_path / "run", engine=Other()))
    assert not (tmp_path / "run").exists()


def test_the_help_of_run_names_the_engines_and_where_their_clients_are() -> None:
    text = " ".join(CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "400"}).stdout.split())
    for name, place in choices().items():
        assert f"{name}, {place}" in text


def test_options_of_an_engine_come_back_from_a_run_folder() -> None:
    engine = SitesEngine("127.0.0.1:0", None, ("a", "b"), 1.0)
    saved = json.loads(json.dumps({"address": engine.address, "keys": None, "clients": engine.clients, "wait": 1.0}))
    assert SitesEngine(**saved).endpoint() == engine.endpoint()
