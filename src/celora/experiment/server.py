"""The engine "sites": the server of real sites; `celora.experiment.client` is the other end.

The server has no rows. It asks the sites for what it must know: how many rows each has, and what the task's clients
must agree on, such as the labels, unless the experiment lists them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from celora.core.algorithm import ClientId
from celora.core.metrics import Metric
from celora.core.task import Task
from celora.data.table import SPLITS, natural_key
from celora.engines.remote import ClientFacts, JobStart
from celora.engines.remote_exchange import Remote
from celora.errors import ConfigError, DataError, QuorumError, WireError
from celora.experiment.config import Experiment, dump
from celora.experiment.population import FederationInfo, ResourceCache, check_quorum
from celora.experiment.runtimes import ClientPool, Engine, Runtime, SessionContext, no_stores, not_written
from celora.track.folder import RunFolder

ROSTER = "sites.json"


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens and for whom, after its address and files have been looked at."""

    address: tuple[str, int]
    tls: tuple[Path, Path] | None
    keys: Mapping[ClientId, bytes]
    expected: tuple[ClientId, ...] | int


@dataclass(frozen=True)
class SitesEngine(Engine):
    """Clients at sites of their own, which connect to this process; `celora resume` listens as before.

    Attributes:
        address: host:port to listen on.
        keys: a folder with server.crt, server.key and sites/<client>.pub; None: plain HTTP on loopback, no keys.
        clients: whom to expect, or how many; None: all that have a key.
        wait: seconds to wait for them.
    """

    address: str
    keys: str | None
    clients: Sequence[ClientId] | int | None
    wait: float

    def check(self, experiment: Experiment, resources: ResourceCache) -> None:
        """As `Engine.check`; the server has no rows."""
        if isinstance(experiment.model.device_map, Mapping):
            found = "found a mapping, which names the devices of one machine; expected 'auto' with sites"
            raise ConfigError([f"model.device_map: {found}"])
        endpoint = self.endpoint()
        if isinstance(endpoint.expected, tuple) and endpoint.tls:
            unknown = [name for name in endpoint.expected if name not in endpoint.keys]
            if unknown:
                some = f"expected some of {', '.join(endpoint.keys)}: those with a key"
                raise ConfigError([f"--clients: found {unknown[0]!r}, {some}"])
        _ = resources.models(experiment, _settled(experiment)).initial

    def endpoint(self) -> Endpoint:
        """Look at the address and the files.

        Raises:
            ConfigError: for an address, keys or clients that cannot be used.
        """
        from celora.site.certificates import public_keys  # noqa: PLC0415  # an extra

        address, keys, tls = parsed(self.address), dict[ClientId, bytes](), None
        if self.keys is None and not loopback(address[0]):
            expected = "expected one of this machine (127.0.0.1)"
            raise ConfigError([f"--insecure: found the address {self.address}, {expected}"])
        if self.keys is not None:
            folder = Path(self.keys)
            tls = folder / "server.crt", folder / "server.key"
            if missing := [str(path) for path in tls if not path.is_file()]:
                raise ConfigError([f"--keys: found no {missing[0]}; make one with `celora keys`, or bring your own"])
            keys = public_keys(folder / "sites")
            if not keys:
                raise ConfigError([f"--keys: found no key in {folder / 'sites'}, expected <site>.pub of each site"])
        clients = tuple(keys) if self.clients is None else self.clients
        if not isinstance(clients, int):
            return Endpoint(address, tls, keys, tuple(clients))
        if not 0 < clients <= (len(keys) or clients):
            most = f"1 to {len(keys)}, as many as have a key" if keys else "at least 1"
            raise ConfigError([f"--clients: found {clients}, expected {most}"])
        return Endpoint(address, tls, keys, clients)

    @contextmanager
    def open(self, session: SessionContext) -> Iterator[Runtime]:
        """Serve the Fleet API, as `Engine.open`.

        Raises:
            ConfigError: for an address or keys that cannot be used.
            FederationError: if nobody can listen there.
        """
        from celora.engines.flower_server import Fleet  # noqa: PLC0415  # an extra

        endpoint, experiment, resources = self.endpoint(), session.experiment, session.resources
        keys, tls, expected = endpoint.keys, endpoint.tls, endpoint.expected
        if isinstance(expected, tuple) and tls:
            expected = tuple(client for client in expected if client in keys)  # a key may have been revoked since
        offer = {
            "celora": version("celora"),
            "federation": session.federation,
            "algorithm": experiment.label,
            "backbone": resources.fingerprint(experiment),
            "config": dump(experiment),
        }
        logged: list[str] = []

        def log(text: str) -> None:
            logged.append(text)
            session.log(text)

        with Fleet(endpoint.address, tls, keys, offer, session.folder / "flower.log") as transport:
            whom = f"{expected} sites" if isinstance(expected, int) else ", ".join(expected)
            log(f"listening on {self.address} for {whom}" + ("" if tls else ", without TLS and without keys"))
            remote = Remote(transport, names=transport.client if tls else None, log=log)
            yield SiteRuntime(remote, resources, expected, self.wait, logged)
            remote.end()


@dataclass(frozen=True)
class Roster:
    """Who takes part in a job, from its beginning to its end, however often it is resumed.

    Attributes:
        clients: name, in order -> its "rows" by split, "baseline" and "data", the SHA-256 of its rows.
        agreement: what they have agreed on, in hex; facts: the same for a reader, such as all labels.
        excluded: client -> why it was left out at the beginning.
    """

    clients: dict[ClientId, dict[str, Any]]
    agreement: str
    facts: dict[str, Any]
    excluded: dict[ClientId, str]


@dataclass
class SiteRuntime(Runtime):
    """Clients at sites of their own.

    Args:
        expected: the clients to wait for, or how many.
        wait: seconds to wait for them at the beginning of a job; then it begins with those that are there.
        logged: what has been logged about the sites, which grows while they come and go.
    """

    remote: Remote
    resources: ResourceCache
    expected: Sequence[ClientId] | int
    wait: float
    logged: list[str] = field(default_factory=list)

    def pool(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """As `Runtime.pool`.

        Raises:
            QuorumError: if no site comes, or fewer than `plan.quorum`.
            DataError: if what the sites propose leaves something open, such as the labels.
        """
        fingerprint = self.resources.fingerprint(experiment)
        start = JobStart(dump(experiment), experiment.label, fingerprint, b"", ())
        saved = folder.read_json(ROSTER) if folder.latest() else None
        roster = self._call_the_roll(experiment, job, start) if saved is None else Roster(**saved)
        folder.write_json(ROSTER, asdict(roster))
        clients, agreement = list(roster.clients), bytes.fromhex(roster.agreement)
        task = experiment.task.agreed(agreement)
        waited_for = set(self.expected) if not isinstance(self.expected, int) else set(clients)
        start = replace(start, agreement=agreement, clients=tuple(clients))
        self.remote.start_job(job, start, [client for client in clients if client in waited_for], self.wait)
        for client, facts in self.remote.facts.items():
            if client in clients and facts.data != roster.clients[client]["data"]:
                self.remote.refused[client] = "its rows are others than when the run began; give it those rows again"
        info = FederationInfo(
            clients=clients,
            task=task,
            agreement=agreement,
            rows={client: facts["rows"] for client, facts in roster.clients.items()},
            baseline={client: facts["baseline"] for client, facts in roster.clients.items()},
            excluded=roster.excluded,
            notices=[f"{client} is left out: {why}" for client, why in sorted(roster.excluded.items())],
            initial=self.resources.models(experiment, task).initial,
            device="sites",
            data={"source": "sites", "sha256": {client: facts["data"] for client, facts in roster.clients.items()}},
            backbone={"name": experiment.model.backbone, "sha256": fingerprint},
        )

        def notices() -> list[str]:
            return list(self.logged)

        def export(name: str) -> list[str]:
            return not_written(self.remote.export(clients, name))

        exchange, sockets = self.remote, lambda: self.remote.sockets
        return ClientPool(info, exchange, no_stores(folder, info), notices, export, sockets, None)

    def _call_the_roll(self, experiment: Experiment, job: str, start: JobStart) -> Roster:
        """Who takes part in a job that has not begun yet."""
        self.remote.start_job(job, start, self.expected, self.wait)
        facts = dict(self.remote.facts)
        clients = sorted((c for c, fact in facts.items() if fact.rows.get("train", 0) > 0), key=natural_key)
        excluded = {**self.remote.refused, **{c: "has no training rows" for c in facts if c not in clients}}
        if not isinstance(self.expected, int):
            absent = [client for client in self.expected if client not in facts and client not in excluded]
            excluded |= dict.fromkeys(absent, f"did not come within {self.wait:g} s")
        agreement = b""
        for client in list(clients):
            try:
                agreement = experiment.task.merge(agreement, facts[client].proposal)
            except WireError as error:
                excluded[client] = f"its proposal cannot be read: {error}"
                clients.remove(client)
        if len(clients) < experiment.plan.quorum:
            why = "; ".join(f"{client}: {reason}" for client, reason in sorted(excluded.items()))
            raise QuorumError(f"{len(clients)} sites have come, plan.quorum is {experiment.plan.quorum} ({why})")
        check_quorum(experiment, len(clients))
        agreed = dict(experiment.task.agreed(agreement).facts)
        rows = {client: _row(facts[client], experiment.task.headline) for client in clients}
        return Roster(rows, agreement.hex(), agreed, excluded)


def _row(facts: ClientFacts, headline: Metric) -> dict[str, Any]:
    """What a roster keeps of a client; a baseline that the headline metric cannot have counts as unknown."""
    known = facts.baseline is not None and headline.admits(facts.baseline)
    rows = {split: facts.rows.get(split, 0) for split in SPLITS}
    return {"rows": rows, "baseline": facts.baseline if known else None, "data": facts.data}


def _settled(experiment: Experiment) -> Task:
    """The task as far as the experiment alone says what it is.

    Raises:
        ConfigError: if that is not enough to know how large the clients' own models' adapters are.
    """
    try:
        return experiment.task.agreed(b"")
    except DataError as error:
        if experiment.model.own is not None:
            raise ConfigError(
                [f"model.own: the adapter is as large as the head, which the server must know beforehand; {error}"]
            ) from None
        return experiment.task


def parsed(address: str) -> tuple[str, int]:
    """host:port, [v6]:port.

    Raises:
        ConfigError: if it is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ConfigError([f"found the address {address!r}, expected host:port such as 127.0.0.1:8000"])
    return host.strip("[]"), int(port)


def loopback(host: str) -> bool:
    """Whether an address stays on this machine."""
    return host in ("127.0.0.1", "::1", "localhost")
