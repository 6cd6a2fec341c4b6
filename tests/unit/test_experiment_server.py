"""The server of real sites: who takes part, from a job's beginning to its end; and what is wrong with a `Listen`."""

from pathlib import Path
from typing import Any

import pytest

from celora.core.messages import Checkpoint
from celora.engines.remote import ClientFacts
from celora.errors import ConfigError, DataError, QuorumError
from celora.experiment.config import Experiment, resolve
from celora.experiment.population import ResourceCache
from celora.experiment.server import Listen, SiteRuntime, resolve_listen
from celora.site.certificates import development
from celora.tasks.classify import Classes
from celora.track.client_stores import ClientStores
from celora.track.folder import RunFolder
from celora.wire import NOTHING, pack

TREE: dict[str, Any] = {"adapter": {"layers": "last:1"}, "plan": {"quorum": 2}, "algorithm": {"name": "fedit"}}


class Far:
    """A `Remote` whose sites are those that are in `here`."""

    def __init__(self, here: dict[str, ClientFacts]) -> None:
        self.here, self.facts, self.refused = here, dict[str, ClientFacts](), dict[str, str]()
        self.begun: list[Any] = []
        self.sockets: dict[str, tuple[int, int]] = {}

    def start_job(self, job: str, begin: Any, expected: Any, seconds: float) -> None:
        self.begun.append((begin.clients, begin.agreement, expected if isinstance(expected, int) else tuple(expected)))
        self.facts, self.refused = dict(self.here), {}


def facts(labels: str = "ab", data: str = "sha", **more: Any) -> ClientFacts:
    rows = {"train": 20, "validation": 5, "test": 5}
    proposal = pack(Classes(tuple(labels))) if labels else b""
    told = {"rows": rows, "proposal": proposal, "baseline": 0.5, "data": data, "backbone": "b", "version": "0"}
    return ClientFacts(**{**told, **more})


@pytest.fixture(scope="module")
def resources() -> ResourceCache:
    return ResourceCache()


def sites(far: Far, resources: ResourceCache) -> SiteRuntime:
    return SiteRuntime(far, resources, ("a", "b", "c"), 1.0)  # type: ignore[arg-type]


def experiment(**data: Any) -> Experiment:
    return resolve({**TREE, "data": data}, Path())


def test_a_job_begins_with_those_that_have_come_and_all_their_labels(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts("ab"), "c": facts("bc"), "b": facts(rows={"train": 0})})
    team = sites(far, resources).team(experiment(), RunFolder(tmp_path), "f/job", {})
    assert team.known.clients == ["a", "c"] and team.known.task.facts == {"classes": ["a", "b", "c"]}
    assert team.known.excluded == {"b": "has no training rows"}
    assert team.known.initial["head.weight"].shape[0] == 3
    assert far.begun == [((), b"", ("a", "b", "c")), (("a", "c"), pack(Classes(("a", "b", "c"))), ("a", "c"))]


def test_a_resumed_job_has_the_clients_and_labels_of_its_beginning(resources: ResourceCache, tmp_path: Path) -> None:
    folder, far = RunFolder(tmp_path), Far({"a": facts("ab"), "b": facts("bc")})
    first = sites(far, resources).team(experiment(), folder, "f/job", {})
    folder.save(Checkpoint(1, b"", {}), ClientStores(folder.stores, NOTHING, 0), {"clients": [], "index": 1})
    later = Far({"a": facts("ab"), "c": facts("xyz")})  # b is away, and c has come, which was not there
    again = sites(later, resources).team(experiment(), folder, "f/job", {})
    assert again.known.clients == first.known.clients == ["a", "b"]
    assert again.known.task == first.known.task
    assert again.known.task.facts == {"classes": ["a", "b", "c"]}
    assert again.known.rows == first.known.rows
    assert later.begun == [(("a", "b"), pack(Classes(("a", "b", "c"))), ("a", "b"))]


def test_rows_that_have_changed_since_are_refused(resources: ResourceCache, tmp_path: Path) -> None:
    folder, far = RunFolder(tmp_path), Far({"a": facts(), "b": facts()})
    sites(far, resources).team(experiment(), folder, "f/job", {})
    folder.save(Checkpoint(1, b"", {}), ClientStores(folder.stores, NOTHING, 0), {"clients": [], "index": 1})
    later = Far({"a": facts(), "b": facts(data="other")})
    sites(later, resources).team(experiment(), folder, "f/job", {})
    assert later.refused == {"b": "its rows are others than when the run began; give it those rows again"}


def test_too_few_sites_and_no_labels_are_named(resources: ResourceCache, tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match=r"1 sites have come, plan.quorum is 2 \(b: did not come within 1 s; c: did"):
        sites(Far({"a": facts()}), resources).team(experiment(), RunFolder(tmp_path / "1"), "f/job", {})
    silent = Far({"a": facts(""), "b": facts("")})
    with pytest.raises(DataError, match=r"no site has told its labels, and task\.classes lists none"):
        sites(silent, resources).team(experiment(), RunFolder(tmp_path / "2"), "f/job", {})
    team = sites(silent, resources).team(experiment(classes=["u", "v"]), RunFolder(tmp_path / "3"), "f/job", {})
    assert team.known.task.facts == {"classes": ["u", "v"]}


def test_a_site_whose_proposal_cannot_be_read_is_left_out(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts("ab"), "b": facts(proposal=b"no record"), "c": facts("bc")})
    team = sites(far, resources).team(experiment(), RunFolder(tmp_path), "f/job", {})
    assert team.known.clients == ["a", "c"]
    assert team.known.excluded["b"].startswith("its proposal cannot be read: ")


def test_what_a_site_claims_of_its_baseline_may_be_no_score(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts(baseline=float("nan")), "b": facts(baseline=7.0), "c": facts()})
    team = sites(far, resources).team(experiment(), RunFolder(tmp_path), "f/job", {})
    assert team.known.baseline == {"a": None, "b": None, "c": 0.5}


def test_what_is_wrong_with_an_address_or_keys_is_told(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    development(keys, ["a", "b"], [])
    assert resolve_listen(Listen("127.0.0.1:0", str(keys), None, 1)).expected == ("a", "b")
    wrong = {
        r"found the address 'here', expected host:port": Listen("here", str(keys), None, 1),
        r"--insecure: found the address 0\.0\.0\.0:1, expected one of this machine": Listen("0.0.0.0:1", None, 2, 1),
        r"--keys: found no .*server\.crt; make one with `celora keys`": Listen("127.0.0.1:0", str(tmp_path), None, 1),
        r"--clients: found 3, expected 1 to 2, as many as have a key": Listen("127.0.0.1:0", str(keys), 3, 1),
        r"--clients: found 0, expected at least 1": Listen("127.0.0.1:0", None, 0, 1),
    }
    for words, listen in wrong.items():
        with pytest.raises(ConfigError, match=words):
            resolve_listen(listen)
    for key in (keys / "sites").iterdir():
        key.unlink()
    with pytest.raises(ConfigError, match=r"--keys: found no key in .*sites, expected <site>\.pub of each site"):
        resolve_listen(Listen("127.0.0.1:0", str(keys), None, 1))
