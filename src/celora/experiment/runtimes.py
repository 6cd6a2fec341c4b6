"""What the engines share: the protocol between a session and whatever runs its clients.

Engine        what a user chooses, with its options; the table of them is `celora.experiment.engines.ENGINES`
Runtime       an engine that has been opened; it lasts for all jobs of a session
ClientPool    the clients of one job, from where the server stands
JobContext    one client of one job, from where the client stands
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from celora.core.algorithm import AnyAlgorithm, ClientId
from celora.core.channel import Channel
from celora.core.learner import Learner
from celora.core.messages import Exchange
from celora.engines.remote import ClientFacts
from celora.experiment.config import Experiment
from celora.experiment.population import FederationInfo, Population, ResourceCache
from celora.tensors import Tensors
from celora.track.client_stores import ClientStores
from celora.track.disk import folder_name
from celora.track.folder import RunFolder
from celora.wire import Schema

Log = Callable[[str], None]
"""Takes a line about what happens between two events, such as who has joined."""


@dataclass(frozen=True)
class ClientPool:
    """The clients of one job, from where the server stands.

    Attributes:
        info: what the server knows of them.
        exchange: sends them instructions and brings back their replies.
        stores: what checkpoints must keep of the clients; empty where the clients keep it themselves.
        notices: what there is to report about the clients so far.
        export: name of a kept model -> every client's adapter is written; returns what did not work.
        sockets: bytes each client's sockets sent and received in the last exchange, where they are counted.
        adapters: the folder that they are written to; None: each client has its own at its site.
    """

    info: FederationInfo
    exchange: Exchange
    stores: ClientStores
    notices: Callable[[], Sequence[str]]
    export: Callable[[str], Sequence[str]]
    sockets: Callable[[], Mapping[ClientId, tuple[int, int]]]
    adapters: str | None


class Runtime(Protocol):
    """Whatever runs the clients of a session."""

    def pool(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """The clients of a job.

        Args:
            folder: of the job.
            job: the job's name at its sites, the same when it is resumed.
            stores: client -> the name of its store in the checkpoint that the job continues from.
        """


@dataclass(frozen=True)
class SessionContext:
    """What the jobs of a session have in common.

    Attributes:
        experiment: as it was written; each job is a variant of it.
        folder: of the session.
        federation: the name under which sites keep their state.
    """

    experiment: Experiment
    resources: ResourceCache
    folder: Path
    federation: str
    log: Log


@dataclass(frozen=True)
class Engine(ABC):
    """Where the clients of a session are. Its fields are its options: JSON values, which session.json keeps."""

    @abstractmethod
    def check(self, experiment: Experiment, resources: ResourceCache) -> None:
        """Find out before a run folder is made whether this variant of an experiment can be run here.

        Raises:
            CeloraError, ValueError: if it cannot, as far as that can be known.
        """

    @abstractmethod
    def open(self, session: SessionContext) -> AbstractContextManager[Runtime]:
        """Start what the jobs of a session need.

        Raises:
            CeloraError: if it cannot be started.
        """


def check_population(experiment: Experiment, resources: ResourceCache) -> None:
    """`Engine.check` where the rows of all clients are on this machine."""
    population = resources.population(experiment)
    experiment.algorithm.client_init(population.learner(population.clients[0], 1))


def no_stores(folder: RunFolder, info: FederationInfo) -> ClientStores:
    """What checkpoints keep of clients that keep their state themselves."""
    return ClientStores(folder.stores, Schema.of(info.initial), 0)


def adapter_folder(folder: RunFolder, client: ClientId) -> Path:
    """Where a client's adapter is written in a job's folder."""
    return folder.path / "adapters" / folder_name(client)


def not_written(problems: Mapping[ClientId, str]) -> list[str]:
    """Notices of adapters that were not written."""
    return [f"{client}: its adapter was not written: {why}" for client, why in sorted(problems.items())]


@dataclass(frozen=True)
class JobContext:
    """One client of one job, from where the client stands (`celora.site.site.JobContext`)."""

    population: Population
    client: ClientId
    facts: ClientFacts

    @property
    def algorithm(self) -> AnyAlgorithm:
        """What is run."""
        return self.population.experiment.algorithm

    @property
    def channel(self) -> Channel:
        """The stages that the experiment names."""
        return self.population.experiment.filters

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
    """The context of a client's job.

    Args:
        proposal: its part in what the clients agree on, where the server asks for it.
    """
    info = population.info
    facts = ClientFacts(
        rows=info.rows[client],
        proposal=proposal,
        baseline=info.baseline[client],
        data=info.data["sha256"],
        backbone=info.backbone["sha256"],
        version=version("celora"),
    )
    return JobContext(population, client, facts)
