"""The server of real sites: who takes part, from a job's beginning to its end; and what is wrong with its address."""

from pathlib import Path
from typing import Any

import pytest

from celora.core.messages import Checkpoint
from celora.engines.remote import ClientFacts
from celora.errors import ConfigError, DataError, QuorumError
from celora.experiment.config import Experiment, resolve
from celora.experiment.population import ResourceCache
from celora.experiment.server import SiteRuntime, SitesEngine
from celora.site.certificates import development
from celora.tasks.classes import Classes
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


def experiment(**task: Any) -> Experiment:
    return resolve({**TREE, "task": task}, Path())


def test_a_job_begins_with_those_that_have_come_and_all_their_labels(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts("ab"), "c": facts("bc"), "b": facts(rows={"train": 0})})
    pool = sites(far, resources).pool(experiment(), RunFolder(tmp_path), "f/job", {})
    assert pool.info.clients == ["a", "c"] and pool.info.task.facts == {"classes": ["a", "b", "c"]}
    assert pool.info.excluded == {"b": "has no training rows"}
    assert pool.info.initial["head.weight"].shape[0] == 3
    assert far.begun == [((), b"", ("a", "b", "c")), (("a", "c"), pack(Classes(("a", "b", "c"))), ("a", "c"))]


def test_a_resumed_job_has_the_clients_and_labels_of_its_beginning(resources: ResourceCache, tmp_path: Path) -> None:
    folder, far = RunFolder(tmp_path), Far({"a": facts("ab"), "b": facts("bc")})
    first = sites(far, resources).pool(experiment(), folder, "f/job", {})
    folder.save(Checkpoint(1, b"", {}), ClientStores(folder.stores, NOTHING, 0), {"clients": [], "index": 1})
    later = Far({"a": facts("ab"), "c": facts("xyz")})  # b is away, and c has come, which was not there
    again = sites(later, resources).pool(experiment(), folder, "f/job", {})
    assert again.info.clients == first.info.clients == ["a", "b"]
    assert again.info.task == first.info.task
    assert again.info.task.facts == {"classes": ["a", "b", "c"]}
    assert again.info.rows == first.info.rows
    assert later.begun == [(("a", "b"), pack(Classes(("a", "b", "c"))), ("a", "b"))]


def test_rows_that_have_changed_since_are_refused(resources: ResourceCache, tmp_path: Path) -> None:
    folder, far = RunFolder(tmp_path), Far({"a": facts(), "b": facts()})
    sites(far, resources).pool(experiment(), folder, "f/job", {})
    folder.save(Checkpoint(1, b"", {}), ClientStores(folder.stores, NOTHING, 0), {"clients": [], "index": 1})
    later = Far({"a": facts(), "b": facts(data="other")})
    sites(later, resources).pool(experiment(), folder, "f/job", {})
    assert later.refused == {"b": "its rows are others than when the run began; give it those rows again"}


def test_too_few_sites_and_no_labels_are_named(resources: ResourceCache, tmp_path: Path) -> None:
    with pytest.raises(QuorumError, match=r"1 sites have come, plan.quorum is 2 \(b: did not come within 1 s; c: did"):
        sites(Far({"a": facts()}), resources).pool(experiment(), RunFolder(tmp_path / "1"), "f/job", {})
    silent = Far({"a": facts(""), "b": facts("")})
    with pytest.raises(DataError, match=r"no site has told its labels, and task\.classes lists none"):
        sites(silent, resources).pool(experiment(), RunFolder(tmp_path / "2"), "f/job", {})
    pool = sites(silent, resources).pool(experiment(classes=["u", "v"]), RunFolder(tmp_path / "3"), "f/job", {})
    assert pool.info.task.facts == {"classes": ["u", "v"]}


def test_a_site_whose_proposal_cannot_be_read_is_left_out(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts("ab"), "b": facts(proposal=b"no record"), "c": facts("bc")})
    pool = sites(far, resources).pool(experiment(), RunFolder(tmp_path), "f/job", {})
    assert pool.info.clients == ["a", "c"]
    assert pool.info.excluded["b"].startswith("its proposal cannot be read: ")


def test_a_proposal_that_cannot_be_read_costs_its_sender_the_job(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts(), "b": facts(proposal=b"no frame"), "c": facts("bc")})
    pool = sites(far, resources).pool(experiment(), RunFolder(tmp_path), "f/job", {})
    assert pool.info.clients == ["a", "c"] and "its proposal cannot be read" in pool.info.excluded["b"]


def test_what_a_site_claims_of_its_baseline_may_be_no_score(resources: ResourceCache, tmp_path: Path) -> None:
    far = Far({"a": facts(baseline=float("nan")), "b": facts(baseline=7.0), "c": facts()})
    pool = sites(far, resources).pool(experiment(), RunFolder(tmp_path), "f/job", {})
    assert pool.info.baseline == {"a": None, "b": None, "c": 0.5}


def test_what_is_wrong_with_an_address_or_keys_is_told(tmp_path: Path) -> None:
    keys, here = tmp_path / "keys", "127.0.0.1:0"
    development(keys, ["a", "b"], [])
    assert SitesEngine(here, str(keys), None, 1).endpoint().expected == ("a", "b")
    wrong = {
        r"found the address 'here', expected host:port": SitesEngine("here", str(keys), None, 1),
        r"--insecure: found the address 0\.0\.0\.0:1, expected one of": SitesEngine("0.0.0.0:1", None, 2, 1),
        r"--keys: found no .*server\.crt; make one with `celora keys`": SitesEngine(here, str(tmp_path), None, 1),
        r"--clients: found 3, expected 1 to 2, as many as have a key": SitesEngine(here, str(keys), 3, 1),
        r"--clients: found 0, expected at least 1": SitesEngine(here, None, 0, 1),
    }
    for words, engine in wrong.items():
        with pytest.raises(ConfigError, match=words):
            engine.endpoint()
    for key in (keys / "sites").iterdir():
        key.unlink()
    with pytest.raises(ConfigError, match=r"--keys: found no key in .*sites, expected <site>\.pub of each site"):
        SitesEngine(here, str(keys), None, 1).endpoint()
