"""A site's end: what it takes from the server's experiment, and what it decides itself."""

import csv
import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from celora.engines.remote import JobStart
from celora.errors import ConfigError, DataError, FederationError, RunFolderError
from celora.experiment import client as joining
from celora.experiment.client import Join, SiteData, enter, hold, local, own_secret
from celora.experiment.config import dump, resolve
from celora.experiment.population import ResourceCache
from celora.models.backbone import Backbone
from celora.tasks.classes import Classes
from celora.wire import unpack

TREE = {
    "data": {"source": "sites/*.csv", "client": "hospital", "text": "note", "rows": 8, "max_test": 4},
    "model": {"backbone": "minilm", "allow_download": True},
    "adapter": {"layers": "last:1"},
    "engine": {"group": 7},
    "algorithm": {"name": "fedit"},
}


def config(**data: object) -> str:
    return dump(resolve({**TREE, "data": {**TREE["data"], **data}}, Path()))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "label"])
        writer.writerows([f"text {number}", "ab"[number % 2]] for number in range(40))
    return path


def taking_part(shard: Path, name: str | None = None) -> Join:
    return Join(SiteData(shard), "127.0.0.1:1", shard.parent / "state", None, None, name)


def test_rows_downloads_and_machine_are_the_sites_to_decide(shard: Path) -> None:
    here = local(config(), SiteData(shard))
    assert here.data.source == str(shard) and here.data.client is None and here.data.partition == "natural"
    assert (here.data.text, here.data.rows, here.data.max_test) == ("note", 8, 4)
    assert not here.model.allow_download and here.engine.group is None
    assert local(config(), SiteData(shard, backbone="elsewhere")).model.backbone == "elsewhere"


def test_no_override_of_the_server_is_put_over_what_the_site_decides(shard: Path) -> None:
    override = """
[overrides.fedit.data]
source = "others.csv"
[overrides.fedit.model]
allow_download = true
backbone = "somebody/model"
"""
    here = local(config() + override, SiteData(shard))
    assert here.data.source == str(shard)
    assert not here.model.allow_download and here.model.backbone == "minilm"


def test_separate_test_rows_must_be_given(shard: Path) -> None:
    asked = config(client=None, test="tests/*.csv")
    with pytest.raises(ConfigError, match="give this site's with --test"):
        local(asked, SiteData(shard))
    assert local(asked, SiteData(shard, test=shard)).data.test == str(shard)


def test_a_key_is_never_the_servers_to_choose(shard: Path) -> None:
    asked = dump(resolve({**TREE, "algorithm": {"name": "she-lora", "key": "/dev/zero"}}, Path()))
    with pytest.raises(ConfigError, match=r"--secret: she-lora encrypts; give the file of the sites' key"):
        local(asked, SiteData(shard))
    chosen: Any = local(asked, SiteData(shard, secret=shard)).algorithm
    assert chosen.key == str(shard)


def test_the_splits_are_those_of_the_embedded_run(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("note,label\n" + "\n".join(f"other {n},{'abc'[n % 3]}" for n in range(30)))
    together = resolve({**TREE, "data": {"source": "*.csv", "text": "note", "rows": 8}}, tmp_path)
    population = ResourceCache().population(together)
    begin = JobStart(
        dump(together), "fedit", population.info.backbone["sha256"], population.agreement, ("mine", "other")
    )
    job_context = enter("mine", taking_part(shard))(begin)
    assert job_context.facts.rows == population.info.rows["mine"] and job_context.facts.proposal == b""
    theirs, ours = population.learner("mine", 1), job_context.learner(1)
    for mine, his in zip(ours.batches(), theirs.batches(), strict=True):
        assert {name: t.tolist() for name, t in mine.items() if name != "row"} == {
            name: t.tolist() for name, t in his.items() if name != "row"
        }


def test_labels_are_told_only_where_nobody_has_listed_them(shard: Path) -> None:
    sha = ResourceCache().fingerprint(resolve(TREE, Path()))
    asked = enter("mine", taking_part(shard))
    told = asked(JobStart(config(), "fedit", sha, b"", ())).facts.proposal
    assert unpack(Classes, told).names == ("a", "b")
    assert asked(JobStart(config(classes=["a", "b"]), "fedit", sha, b"", ())).facts.proposal == b""
    with pytest.raises(DataError, match=r"found the label 'b', which task\.classes does not list"):
        asked(JobStart(config(classes=["a"]), "fedit", sha, b"", ()))


def test_another_backbone_is_refused(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "fingerprint", lambda self: "0123456789abcdef" * 4)
    with pytest.raises(FederationError, match=r"minilm has SHA-256 0123456789ab here, f{12} at .* same revision"):
        enter("mine", taking_part(shard))(JobStart(config(), "fedit", "f" * 64, b"", ()))


def test_a_fingerprint_of_another_kind_is_told_apart_from_another_backbone(shard: Path) -> None:
    with pytest.raises(FederationError, match=r"they say nothing of each other: run one version of celora"):
        enter("mine", taking_part(shard))(JobStart(config(), "fedit", "f" * 64, b"", ()))


def test_the_secret_of_secret_bases_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    first = own_secret(tmp_path)
    assert own_secret(tmp_path) == first and 0 <= first < 2**62
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    (tmp_path / "other").mkdir()
    assert own_secret(tmp_path / "other") != first


def test_no_half_of_a_secret_is_ever_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes, opener: object) -> None:
        path.write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(joining, "put", full)
        with pytest.raises(RunFolderError, match="No space left on device"):
            own_secret(tmp_path)
    assert own_secret(tmp_path) > 0
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(RunFolderError, match="found 0 bytes, expected 8: it is damaged; restore it from a backup"):
        own_secret(tmp_path)


def test_a_state_folder_is_for_one_process_and_its_owner(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    with hold(state):
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        with pytest.raises(FederationError, match="in use by another process of this site"), hold(state):
            pass
    with hold(state):
        assert os.listdir(state) == [".lock"]


def test_without_keys_only_this_machine_is_a_server(shard: Path) -> None:
    far = Join(SiteData(shard), "server.example:8000", shard.parent, None, None, "mine")
    with pytest.raises(ConfigError, match=r"--insecure: found the server server\.example:8000, expected one of"):
        far.connection()
    with pytest.raises(ConfigError, match=r"found the address 'server', expected host:port"):
        Join(SiteData(shard), "server", shard.parent, None, None, "mine").connection()
    with pytest.raises(ConfigError, match=r"ca\.crt: cannot be read .*ask the server's operator for it"):
        Join(SiteData(shard), "server.example:8000", shard.parent, shard.parent, None, None).connection()
