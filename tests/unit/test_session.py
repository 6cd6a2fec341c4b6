"""celora.experiment.session: what a run folder says of the session that wrote it, and which folders can be resumed."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from celora.errors import RunFolderError
from celora.experiment import compare, read, resume
from celora.experiment.job import Job
from celora.experiment.session import FILE, SCHEMA, Session

CONFIG = """
[data]
source = "digits"
clients = 2
rows = 8
max_validation = 4
max_test = 4
[model]
backbone = "random-vit"
[adapter]
rank = 2
targets = ["q_proj"]
[plan]
rounds = 1
[algorithm]
name = "fedit"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of two algorithms, done."""
    (tmp_path / "digits.toml").write_text(CONFIG)
    for _ in compare(read(tmp_path / "digits.toml"), ["fedit"], [0], tmp_path / "run"):
        pass
    return tmp_path / "run"


def saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def as_before_schemas(folder: Path) -> None:
    """As celora wrote session.json before it had a schema."""
    now = saved(folder)
    then = {name: now[name] for name in ("kind", "match", "federation", "base", "jobs")} | {"where": "embedded"}
    (folder / FILE).write_text(json.dumps(then))


def test_a_session_says_which_layout_it_has_and_which_version_wrote_it(folder: Path) -> None:
    found = saved(folder)
    assert (found["schema"], found["celora"], found["kind"]) == (SCHEMA, version("celora"), "compare")
    assert found["engine"] == {"name": "embedded", "options": {}}
    assert [job["label"] for job in found["jobs"]] == ["local", "fedit"]


def test_the_summaries_of_an_older_run_are_still_read(folder: Path) -> None:
    summaries = json.loads((folder / "compare.json").read_text())
    as_before_schemas(folder)
    (folder / "experiment.toml").write_text("[no longer]\nknown = true\n")
    opening, *ends, closing = resume(folder)
    assert [job["done"] for job in opening["jobs"]] == [True, True] and opening["rounds"] == 1
    assert [end["summary"] for end in ends] == summaries == closing["summaries"]
    assert closing["compare"] == str(folder / "compare.json")


def test_an_older_run_that_is_not_done_is_refused_with_the_version_that_began_it(folder: Path) -> None:
    as_before_schemas(folder)
    (folder / "fedit" / "summary.json").unlink()
    with pytest.raises(RunFolderError, match=rf"was begun by celora {re.escape(version('celora'))} with layout 0 .*"):
        list(resume(folder))


def test_a_run_is_resumed_whatever_fingerprint_its_manifest_has(folder: Path) -> None:
    """celora once took weights in memory, and now takes files: the same backbone has two fingerprints."""
    path, summaries = folder / "fedit" / "manifest.json", json.loads((folder / "compare.json").read_text())
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"backbone": manifest["backbone"] | {"sha256": "0" * 64}}))
    (folder / "fedit" / "summary.json").unlink()
    *_, closing = resume(folder)
    then, now = ([one["algorithm"] for one in found] for found in (summaries, closing["summaries"]))
    assert now == then == ["local", "fedit"]
    assert closing["summaries"][1]["bytes"] == summaries[1]["bytes"]


def test_a_newer_run_that_is_not_done_is_refused_too(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(saved(folder) | {"schema": SCHEMA + 1, "celora": "9.9"}))
    (folder / "fedit" / "summary.json").unlink()
    words = rf"begun by celora 9\.9 with layout {SCHEMA + 1} of run folders; this is celora .*resumes layout {SCHEMA}: "
    with pytest.raises(RunFolderError, match=words + "resume it with the version that began it"):
        list(resume(folder))


def test_an_engine_that_is_not_installed_is_named(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(saved(folder) | {"engine": {"name": "mine", "options": {}}}))
    with pytest.raises(RunFolderError, match=r"found the engine 'mine', expected one of embedded, flower-sim, sites"):
        list(resume(folder))


def test_a_folder_without_a_session_is_no_run_folder(folder: Path) -> None:
    with pytest.raises(RunFolderError, match=r"found no session\.json \(.*run can be resumed\); expected runs/<name>"):
        list(resume(folder / "fedit"))


def test_a_job_has_a_name_that_no_site_takes_for_another_folder(tmp_path: Path) -> None:
    session = Session("run", [], federation="f")
    assert session.at_sites(Job("ce-lora", 3, tmp_path)) == "f/ce-lora-seed-3"
    assert session.at_sites(Job("../a b", 0, tmp_path)) == "f/a-b-seed-0"
    assert session.at_sites(Job("..", 0, tmp_path)) == "f/job-seed-0"
