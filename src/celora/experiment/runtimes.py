"""Where the clients of a job are: in this process, in Flower's simulation, or at sites of their own.

A runtime is a context, open for a session; for each job it gives a `ClientPool`: what the server knows of the clients,
and the `Exchange` that reaches them.
"""

import hashlib
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.client_state import KeptModel, unpacked
from celora.core.learner import Learner
from celora.core.messages import Exchange
from celora.engines.embedded import Embedded
from celora.engines.remote import ClientFacts, JobStart, Remote
from celora.experiment.config import Experiment, dump, resolve
from celora.experiment.population import FederationInfo, Population, ResourceCache
from celora.site.policy import Policy
from celora.site.site import Site, job_folder
from celora.tensors import Tensors
from celora.track.client_stores import ClientStores
from celora.track.disk import folder_name
from celora.track.folder import RunFolder
from celora.wire import Schema

Sockets = Mapping[ClientId, tuple[int, int]]


@dataclass(frozen=True)
class ClientPool:
    """The clients of one job, from where the server stands.

    Attributes:
        stores: what checkpoints must keep of the clients; nothing where they keep it themselves.
        told: what is to be said of them so far.
        export: a kept model's name -> every client's adapter is written; gives what did not work.
        sockets: bytes each client's sockets sent and received in the last exchange, where they are counted.
        adapters: the folder that they are written to; None: each client has its own at its site.
    """

    known: FederationInfo
    exchange: Exchange
    stores: ClientStores
    told: Callable[[], Sequence[str]]
    export: Callable[[str], Sequence[str]]
    sockets: Callable[[], Sockets]
    adapters: str | None


class Runtime(Protocol):
    """Where clients are."""

    def team(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """The clients of a job.

        Args:
            job: its name, the same when it is resumed.
            stores: the names of the clients' stores in the checkpoint that the job goes on from.
        """


class LocalRuntime:
    """All clients in this process."""

    def __init__(self, resources: ResourceCache) -> None:
        self.resources = resources

    def team(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """As `Runtime.team`."""
        population = self.resources.population(experiment)
        schema = Schema.of(population.initial)
        kept = ClientStores(folder.stores, schema, experiment.engine.state_mb * 2**20, stores)
        engine = Embedded(
            experiment.algorithm, population.learner, kept, schema, *experiment.engine.solver(population.models.device)
        )

        def told() -> list[str]:
            notes = [f"{client}: {note}" for client, notes in sorted(engine.notes.items()) for note in notes]
            return [*notes, *population.models.notices]

        def export(name: str) -> list[str]:
            for client in population.clients:
                if (model := kept.get(client, {}).get(name)) is not None:
                    population.export(adapters(folder, client), client, unpacked(KeptModel, model, schema).weights)
            return []

        return ClientPool(population.known, engine, kept, told, export, dict, str(folder.path / "adapters"))


def adapters(folder: RunFolder, client: ClientId) -> Path:
    """Where a client's adapter is written."""
    return folder.path / "adapters" / folder_name(client)


@dataclass(frozen=True)
class JobContext:
    """A client's place in a job (`celora.site.site.JobContext`)."""

    population: Population
    client: ClientId
    facts: ClientFacts

    @property
    def algorithm(self) -> AnyAlgorithm:
        """What is run."""
        return self.population.experiment.algorithm

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0."""
        return self.population.initial

    def learner(self, round: int) -> Learner:
        """The client's learner in a round."""
        return self.population.learner(self.client, round)

    def export(self, folder: Path, weights: Tensors) -> None:
        """The client's adapter."""
        self.population.export(folder, self.client, weights)


def job_context(population: Population, client: ClientId, proposal: bytes = b"") -> JobContext:
    """A client's place in a job.

    Args:
        proposal: its part in what the clients agree on, where the server asks for it.
    """
    known = population.known
    facts = ClientFacts(
        rows=known.rows[client],
        proposal=proposal,
        baseline=known.baseline[client],
        data=known.data["sha256"],
        backbone=known.backbone["sha256"],
        version=version("celora"),
    )
    return JobContext(population, client, facts)


# --- Flower's simulation


class FlowerSimRuntime:
    """Flower's simulation on this machine. Every client has a folder in the run folder, as a site has at its site."""

    def __init__(self, resources: ResourceCache, remote: Remote, root: Path) -> None:
        self.resources, self.remote, self.root = resources, remote, root

    def team(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """As `Runtime.team`."""
        known = self.resources.population(experiment).known
        clients = tuple(known.clients)
        begin = JobStart(dump(experiment), experiment.label, known.backbone["sha256"], known.agreement, clients)
        self.remote.start_job(job, begin, clients, 600)

        def export(name: str) -> list[str]:
            problems = self.remote.export(clients, name)
            for client in [client for client in clients if client not in problems]:
                written = site_folder(self.root, client) / job_folder(client, job) / "adapter"
                shutil.copytree(written, adapters(folder, client), dirs_exist_ok=True)
            return lost(problems)

        kept = nothing(folder, known)
        return ClientPool(known, self.remote, kept, list, export, dict, str(folder.path / "adapters"))


def nothing(folder: RunFolder, known: FederationInfo) -> ClientStores:
    """What checkpoints keep of clients that keep their state themselves."""
    return ClientStores(folder.stores, Schema.of(known.initial), 0)


def lost(problems: Mapping[ClientId, str]) -> list[str]:
    """What to say of adapters that were not written."""
    return [f"{client}: its adapter was not written: {why}" for client, why in sorted(problems.items())]


def site_folder(root: Path, client: ClientId) -> Path:
    """Where a simulated site keeps its state."""
    return root / "sites" / hashlib.sha256(client.encode()).hexdigest()[:16]


@contextmanager
def simulated(
    experiment: Experiment, resources: ResourceCache, root: Path, log: Callable[[str], None]
) -> Iterator[FlowerSimRuntime]:
    """Start Flower's simulation with a node for every client of the experiment."""
    from celora.engines.flower import simulation  # noqa: PLC0415  # an extra

    clients = list(resources.federation(experiment).clients)
    where = _Simulated(str(experiment.base.resolve()), str(root.resolve()), tuple(clients))
    with simulation(len(clients), where, 1.0, root / "flower.log") as post:
        yield FlowerSimRuntime(resources, Remote(post, log=log), root)


SIMULATED = Policy(**dict[str, Any](floor=1))
"""The policy of simulated sites, whose rows are all on this machine: whatever the algorithm declares may leave."""


@dataclass(frozen=True)
class _Simulated:
    """Position -> the site there; goes to Ray's processes, and the site is made in each when it is first needed."""

    base: str
    root: str
    clients: tuple[ClientId, ...]

    def __call__(self, position: int) -> Site:
        return _simulated_site(self, self.clients[position])


@cache
def _simulated_site(where: _Simulated, client: ClientId) -> Site:
    resources = _resources()

    def enter(begin: JobStart) -> JobContext:
        experiment = resolve(tomllib.loads(begin.config), Path(where.base))
        return job_context(resources.population(experiment), client)

    return Site(client, site_folder(Path(where.root), client), SIMULATED, enter, None)


@cache
def _resources() -> ResourceCache:
    """One for all sites that Ray's process plays."""
    return ResourceCache()
