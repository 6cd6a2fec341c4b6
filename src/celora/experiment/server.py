"""The server of a federation of real sites (a `Runtime`); `celora.experiment.client` is the other end.

The server has no rows. What it must know it asks for: how many rows each site has, and what the task's clients must
agree on, such as the labels, unless the experiment lists them.
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from celora.core.algorithm import ClientId
from celora.core.metrics import Metric
from celora.core.task import Task
from celora.data.table import SPLITS, natural_key
from celora.engines.remote import ClientFacts, JobStart, Remote
from celora.errors import ConfigError, DataError, QuorumError, WireError
from celora.experiment.config import Experiment, dump
from celora.experiment.population import FederationInfo, ResourceCache, check_quorum
from celora.experiment.runtimes import ClientPool, lost, nothing
from celora.track.folder import RunFolder

ROSTER = "sites.json"


@dataclass(frozen=True)
class Roster:
    """Who takes part in a job, from its beginning to its end, however often it is resumed.

    Attributes:
        clients: name, in order -> its "rows" by split, "baseline" and "data", the SHA-256 of its rows.
        agreement: what they have agreed on, in base64; facts: the same for a reader, such as all labels.
        excluded: client -> why it was left out at the beginning.
    """

    clients: dict[ClientId, dict[str, Any]]
    agreement: str
    facts: dict[str, Any]
    excluded: dict[ClientId, str]


@dataclass
class SiteRuntime:
    """Clients at sites of their own (a `Runtime`).

    Args:
        expected: the clients to wait for, or how many.
        wait: seconds to wait for them at the beginning of a job; then it begins with those that are there.
        said: what the remote has to say, as it is said.
    """

    remote: Remote
    resources: ResourceCache
    expected: Sequence[ClientId] | int
    wait: float
    said: list[str] = field(default_factory=list)

    def team(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """As `Runtime.team`.

        Raises:
            QuorumError: if no site comes, or fewer than `plan.quorum`.
            DataError: if what the sites propose leaves something open, such as the labels.
        """
        fingerprint = self.resources.fingerprint(experiment)
        begin = JobStart(dump(experiment), experiment.label, fingerprint, b"", ())
        kept = folder.read_json(ROSTER) if folder.latest() else None
        roster = self._call_the_roll(experiment, job, begin) if kept is None else Roster(**kept)
        folder.write_json(ROSTER, asdict(roster))
        clients, agreement = list(roster.clients), b64decode(roster.agreement)
        task = experiment.task.agreed(agreement)
        here = set(self.expected) if not isinstance(self.expected, int) else set(clients)
        begin = replace(begin, agreement=agreement, clients=tuple(clients))
        self.remote.start_job(job, begin, [client for client in clients if client in here], self.wait)
        for client, facts in self.remote.facts.items():
            if client in clients and facts.data != roster.clients[client]["data"]:
                self.remote.refused[client] = "its rows are others than when the run began; give it those rows again"
        known = FederationInfo(
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

        def told() -> list[str]:
            return list(self.said)

        def export(name: str) -> list[str]:
            return lost(self.remote.export(clients, name))

        return ClientPool(known, self.remote, nothing(folder, known), told, export, lambda: self.remote.sockets, None)

    def _call_the_roll(self, experiment: Experiment, job: str, begin: JobStart) -> Roster:
        """Who takes part in a job that has not begun yet."""
        self.remote.start_job(job, begin, self.expected, self.wait)
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
        return Roster(rows, b64encode(agreement).decode(), agreed, excluded)


def _row(facts: ClientFacts, headline: Metric) -> dict[str, Any]:
    """What is kept of a client; a score that the headline cannot have counts as not told."""
    told = facts.baseline is not None and headline.admits(facts.baseline)
    rows = {split: facts.rows.get(split, 0) for split in SPLITS}
    return {"rows": rows, "baseline": facts.baseline if told else None, "data": facts.data}


@dataclass(frozen=True)
class Listen:
    """How a server is reached, and by whom; kept in the run folder, so that `celora resume` listens as before.

    Attributes:
        address: host:port.
        keys: a folder with server.crt, server.key and sites/<client>.pub; None: plain HTTP on loopback, no keys.
        clients: whom to expect where there are no keys, or how many; None: all that have a key.
        wait: seconds to wait for them.
    """

    address: str
    keys: str | None
    clients: tuple[str, ...] | int | None
    wait: float


@dataclass(frozen=True)
class ResolvedListen:
    """A `Listen` whose address and files have been looked at."""

    address: tuple[str, int]
    tls: tuple[Path, Path] | None
    keys: Mapping[ClientId, bytes]
    expected: tuple[ClientId, ...] | int


def resolve_listen(listen: Listen) -> ResolvedListen:
    """
    Raises:
        ConfigError: for an address, keys or clients that cannot be used.
    """
    from celora.site.certificates import public_keys  # noqa: PLC0415  # an extra

    address, keys, tls = parsed(listen.address), dict[ClientId, bytes](), None
    if listen.keys is None and not loopback(address[0]):
        raise ConfigError([f"--insecure: found the address {listen.address}, expected one of this machine (127.0.0.1)"])
    if listen.keys is not None:
        tls = Path(listen.keys) / "server.crt", Path(listen.keys) / "server.key"
        if missing := [str(path) for path in tls if not path.is_file()]:
            raise ConfigError([f"--keys: found no {missing[0]}; make one with `celora keys`, or bring your own"])
        keys = public_keys(Path(listen.keys) / "sites")
        if not keys:
            raise ConfigError(
                [f"--keys: found no key in {Path(listen.keys) / 'sites'}, expected <site>.pub of each site"]
            )
    expected = listen.clients if listen.clients is not None else tuple(keys)
    if isinstance(expected, int) and not 0 < expected <= (len(keys) or expected):
        most = f"1 to {len(keys)}, as many as have a key" if keys else "at least 1"
        raise ConfigError([f"--clients: found {expected}, expected {most}"])
    return ResolvedListen(address, tls, keys, expected)


@contextmanager
def serving(
    listen: Listen,
    experiment: Experiment,
    resources: ResourceCache,
    root: Path,
    federation: str,
    log: Callable[[str], None],
) -> Iterator[SiteRuntime]:
    """Serve the Fleet API for a session.

    Raises:
        ConfigError: for an address or keys that cannot be used.
        FederationError: if nobody can listen there.
    """
    from celora.engines.flower import Fleet  # noqa: PLC0415  # an extra

    at = resolve_listen(listen)
    keys, tls, expected = at.keys, at.tls, at.expected
    if isinstance(expected, tuple) and tls:
        expected = tuple(client for client in expected if client in keys)  # a key may have been revoked since
    offer = {
        "celora": version("celora"),
        "federation": federation,
        "algorithm": experiment.label,
        "backbone": resources.fingerprint(experiment),
        "config": dump(experiment),
    }
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        log(text)

    with Fleet(at.address, tls, keys, offer, root / "flower.log") as post:
        whom = f"{expected} sites" if isinstance(expected, int) else ", ".join(expected)
        tell(f"listening on {listen.address} for {whom}" + ("" if tls else ", without TLS and without keys"))
        remote = Remote(post, names=post.client if tls else None, log=tell)
        yield SiteRuntime(remote, resources, expected, listen.wait, said)
        remote.end()


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


def check_server(experiment: Experiment, resources: ResourceCache, listen: Listen) -> None:
    """Whether a server without rows can run this there.

    Raises:
        CeloraError: if not, as far as it can be known.
    """
    at = resolve_listen(listen)
    if isinstance(at.expected, tuple) and (unknown := [name for name in at.expected if at.tls and name not in at.keys]):
        raise ConfigError([f"--clients: found {unknown[0]!r}, expected some of {', '.join(at.keys)}: those with a key"])
    _ = resources.models(experiment, _settled(experiment)).initial


def _settled(experiment: Experiment) -> Task:
    """The task as far as the experiment alone says what it is.

    Raises:
        ConfigError: if that is not enough to know how large the clients' own models' adapters are.
    """
    try:
        return experiment.task.agreed(b"")
    except DataError:
        if experiment.model.own is not None:
            raise ConfigError(
                ["task.classes: with model.own the server must know all labels beforehand; list them"]
            ) from None
        return experiment.task
