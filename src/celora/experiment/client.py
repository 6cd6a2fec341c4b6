"""A site of a federation: how it takes part with its own rows, and what it checks before.

The server's experiment says what is trained. The site says which rows, which weights and which folder are used.
"""

import os
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from celora import data
from celora.algorithms.lookup import lookup
from celora.core.algorithm import ClientId
from celora.engines.flower_site import NodeConnection, run_node
from celora.engines.remote import JobStart
from celora.errors import CeloraError, ConfigError, DataError, FederationError, RunFolderError
from celora.experiment.config import Experiment, resolve
from celora.experiment.population import ResourceCache
from celora.experiment.runtimes import JobContext, job_context
from celora.experiment.server import loopback, parsed
from celora.marks import SiteSecret, marked
from celora.site.certificates import private_key
from celora.site.check import Finding, backbone, certificate, clock, disk, key, passed, reach, versions
from celora.site.ledger import Ledger
from celora.site.policy import NO_FILE, Policy, read_policy
from celora.site.site import Site
from celora.track.disk import owners, put, sync, writing

NEEDED = 1 << 30
"""Bytes that a site's folder should have room for."""


@dataclass(frozen=True)
class SiteData:
    """Where a site's rows and weights are, which the server does not decide.

    Attributes:
        source, test: paths or patterns, as `data.source` and `data.test`.
        backbone: instead of the experiment's `model.backbone`; its weights must be equal.
        secret: the key that the sites share where the algorithm encrypts (SHE-LoRA); the server never names it.
    """

    source: Path
    test: Path | None = None
    backbone: str | None = None
    secret: Path | None = None


def enter(name: ClientId, site: "Join", policy: Policy = NO_FILE) -> Callable[[JobStart], JobContext]:
    """What a site does when a job begins: read its rows and the backbone, and check that they fit the server's."""
    resources, rows = ResourceCache(), site.rows

    def enter_job(start: JobStart) -> JobContext:
        experiment = local(start.config, rows, policy)
        if not (finding := backbone(start.backbone, resources.fingerprint(experiment))).ok:
            raise FederationError(f"the backbone {experiment.model.backbone} has {finding.found}: {finding.todo}")
        task = experiment.task
        federation = data.alone(experiment.data, experiment.base, name, experiment.plan.seed, task)
        if name not in federation.clients:
            raise DataError(f"{rows.source}: {name} {federation.excluded[name]}; a site needs rows to take part")
        proposal = task.propose(federation.table)
        agreement, everyone = start.agreement, start.clients
        if not start.clients:  # nobody has agreed yet: the server asks who is there
            agreement, everyone = task.merge(b"", proposal), (name,)
        population = resources.populated(
            experiment, federation, agreement, everyone=everyone, secret=lambda _: own_secret(site.state)
        )
        return job_context(population, name, b"" if start.clients else proposal)

    return enter_job


@dataclass(frozen=True)
class Join:
    """How a site takes part.

    Attributes:
        server: host:port.
        state: the site's folder.
        keys: a folder with site.key and ca.crt; None: plain HTTP on loopback, no keys.
        policy: the site's policy file.
        name: the client's name where there are no keys; where there are, the server knows it by its key.
    """

    rows: SiteData
    server: str
    state: Path
    keys: Path | None
    policy: Path | None
    name: str | None

    def connection(self) -> NodeConnection:
        """The connection to the server.

        Raises:
            ConfigError: if the key or the CA's certificate cannot be used.
        """
        host, _ = parsed(self.server)
        if self.keys is None:
            if not loopback(host):
                raise ConfigError(
                    [f"--insecure: found the server {self.server}, expected one of this machine (127.0.0.1)"]
                )
            return NodeConnection(self.server, None, None)
        ca = self.keys / "ca.crt"
        try:
            root = ca.read_bytes()
        except OSError as error:
            raise ConfigError([f"{ca}: cannot be read ({error.strerror}): ask the server's operator for it"]) from error
        return NodeConnection(self.server, root, private_key(self.keys / "site.key"))


def join(site: Join, stop: threading.Event, log: Callable[[str], None], *, once: bool = False) -> None:
    """Take part until `stop`; with `once` until the server says that it has finished.

    Raises:
        CeloraError: if the policy, the keys or the folder cannot be used, or the server refuses this site.
    """
    policy, connection = read_policy(site.policy) if site.policy else NO_FILE, site.connection()
    for text in policy.describe():
        log(text)
    with hold(site.state):
        ledger, sites = Ledger(site.state / "ledger.jsonl"), dict[ClientId, Site]()

        def handler(offer: Mapping[str, Any]) -> Callable[[bytes], bytes]:
            name: ClientId = offer["client"] or site.name or ""
            if name not in sites:
                sites[name] = Site(name, site.state, policy, enter(name, site, policy), ledger, connection.socket, log)
            answer = sites[name]

            def handle(frame: bytes) -> bytes:
                response = answer(frame)
                if answer.over and once:
                    stop.set()
                return response

            return handle

        run_node(connection, handler, stop, log)


@contextmanager
def hold(state: Path) -> Iterator[None]:
    """Hold the site's folder, which is for one process at a time and for its owner alone.

    Raises:
        FederationError: if another process has it.
    """
    with writing(state):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        state.chmod(0o700)
    try:
        with FileLock(state / ".lock", timeout=0, mode=0o600):
            yield
    except Timeout:
        raise FederationError(f"{state} is in use by another process of this site: wait for it, or end it") from None


def check(site: Join) -> list[Finding]:
    """Find out what stands in the way of taking part; nothing is sent but a request for the server's offer."""
    findings = [disk(site.state, NEEDED)]
    root = site.keys / "ca.crt" if site.keys else None
    if site.keys is not None and root is not None:
        findings += [certificate(root, site.server), key(site.keys / "site.key")]
    findings.append(reach(site.server, root))
    try:
        policy = read_policy(site.policy) if site.policy else NO_FILE
        findings.append(Finding("policy", True, "; ".join(policy.describe())))
    except ConfigError as error:
        findings.append(Finding("policy", False, "; ".join(error.problems), "mend the file"))
        policy = NO_FILE
    if not passed(findings):
        return findings
    try:
        offer = site.connection().offer()
    except (CeloraError, OSError, ValueError) as error:
        return [*findings, Finding("the server's offer", False, str(error), "mend that, and check again")]
    name: ClientId = offer["client"] or site.name or ""
    findings += [
        Finding("this site's key", True, f"the server knows it as {name}")
        if site.keys
        else Finding("this site's name", bool(name), str(name), "" if name else "give it with --name"),
        clock(offer["time"], time.time()),
        versions(offer["celora"], version("celora")),
    ]
    resources = ResourceCache()
    try:
        experiment = local(offer["config"], site.rows, policy)
        federation = data.alone(experiment.data, experiment.base, name, experiment.plan.seed, experiment.task)
        share = federation.clients.get(name)
        train = len(share.train) if share else 0
        found = (
            f"{train} training, {len(share.validation)} validation, {len(share.test)} test rows" if share else "none"
        )
        todo = f"the policy's floor is {policy.floor} training rows"
        findings.append(
            Finding(f"rows of {site.rows.source}", train >= policy.floor, found, todo if train < policy.floor else "")
        )
        findings.append(backbone(offer["backbone"], resources.fingerprint(experiment)))
    except (CeloraError, ValueError, KeyError) as error:  # what the server sends may be no experiment at all
        findings.append(Finding("rows and backbone", False, str(error), "mend that, and check again"))
    return findings


def local(config: str, rows: SiteData, policy: Policy = NO_FILE) -> Experiment:
    """The server's experiment with this site's own rows, weights and machine.

    Raises:
        ConfigError: if it is not one.
        PolicyError: if the algorithm may not run here; nothing that the server names has been imported then.
    """
    tree = tomllib.loads(config)
    algorithm: str = tree["algorithm"]["name"]
    policy.permit(algorithm)
    if "test" in tree["data"] and rows.test is None:
        raise ConfigError(["--test: the experiment has separate test rows (data.test); give this site's with --test"])
    own = {"source": str(rows.source.resolve()), "partition": "natural", "clients_per_group": 1}
    tree["data"] = {name: value for name, value in tree["data"].items() if name not in ("client", "test")} | own
    if rows.test is not None:
        tree["data"]["test"] = str(rows.test.resolve())
    tree["model"]["allow_download"] = False
    if rows.backbone is not None:
        tree["model"]["backbone"] = rows.backbone
    for name in marked(lookup(algorithm), SiteSecret):
        if rows.secret is None:
            raise ConfigError([f"--secret: {algorithm} encrypts; give the file of the sites' key"])
        tree["algorithm"][name] = str(rows.secret.resolve())
    for section in ("engine", "overrides"):  # an override would be put over all of this
        tree.pop(section, None)
    return resolve(tree, Path.cwd())


def own_secret(state: Path) -> int:
    """What this site draws secret bases from; it is made once, kept in the site's folder and never transmitted.

    Raises:
        RunFolderError: if it cannot be written or read, or is damaged.
    """
    path, new = state / "secret", state / "secret.tmp"
    with writing(path):
        if not path.exists():
            put(new, secrets.token_bytes(8), owners)
            os.replace(new, path)  # a process that is killed, or a full disk, leaves no half of a secret
            sync(state)
        found = path.read_bytes()
    if len(found) != 8:
        raise RunFolderError(f"{path}: found {len(found)} bytes, expected 8: it is damaged; restore it from a backup")
    return int.from_bytes(found, "little") >> 2
