"""Where the clients of a job are: in this process, in Flower's simulation, or at sites of their own.

A place is a context, open for a session; for each job it gives a `Team`: what the server knows of the clients, and the
`Exchange` that reaches them.
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
from celora.core.learner import Learner
from celora.core.messages import Exchange, Model, opened
from celora.engines.embedded import Embedded
from celora.engines.remote import Begin, Facts, Remote
from celora.experiment.config import Experiment, dump, resolve
from celora.experiment.world import Known, Workshop, World
from celora.site.policy import Policy
from celora.site.site import Site, job_folder
from celora.tensors import Tensors
from celora.track.disk import folder_name
from celora.track.folder import RunFolder
from celora.track.shelves import Shelves
from celora.wire import Schema

Sockets = Mapping[ClientId, tuple[int, int]]


@dataclass(frozen=True)
class Team:
    """The clients of one job, from where the server stands.

    Attributes:
        shelves: what checkpoints must keep of the clients; nothing where they keep it themselves.
        told: what is to be said of them so far.
        export: a kept model's name -> every client's adapter is written; gives what did not work.
        sockets: bytes each client's sockets sent and received in the last exchange, where they are counted.
        adapters: the folder that they are written to; None: each client has its own at its site.
    """

    known: Known
    exchange: Exchange
    shelves: Shelves
    told: Callable[[], Sequence[str]]
    export: Callable[[str], Sequence[str]]
    sockets: Callable[[], Sockets]
    adapters: str | None


class Place(Protocol):
    """Where clients are."""

    def team(self, experiment: Experiment, folder: RunFolder, job: str, shelves: Mapping[ClientId, str]) -> Team:
        """The clients of a job.

        Args:
            job: its name, the same when it is resumed.
            shelves: the names of the clients' shelves in the checkpoint that the job goes on from.
        """


class Here:
    """All clients in this process."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def team(self, experiment: Experiment, folder: RunFolder, job: str, shelves: Mapping[ClientId, str]) -> Team:
        """As `Place.team`."""
        world = self.workshop.world(experiment)
        schema = Schema.of(world.initial)
        kept = Shelves(folder.shelves, schema, experiment.engine.state_mb * 2**20, shelves)
        engine = Embedded(
            experiment.algorithm, world.learner, kept, schema, *experiment.engine.solver(world.models.device)
        )

        def told() -> list[str]:
            notes = [f"{client}: {note}" for client, notes in sorted(engine.notes.items()) for note in notes]
            return [*notes, *world.models.notices]

        def export(name: str) -> list[str]:
            for client in world.clients:
                if (model := kept.get(client, {}).get(name)) is not None:
                    world.export(adapters(folder, client), client, opened(Model, model, schema).weights)
            return []

        return Team(world.known, engine, kept, told, export, dict, str(folder.path / "adapters"))


def adapters(folder: RunFolder, client: ClientId) -> Path:
    """Where a client's adapter is written."""
    return folder.path / "adapters" / folder_name(client)


@dataclass(frozen=True)
class Seat:
    """A client's place in a job (`celora.site.site.Seat`)."""

    world: World
    client: ClientId
    facts: Facts

    @property
    def algorithm(self) -> AnyAlgorithm:
        """What is run."""
        return self.world.experiment.algorithm

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0."""
        return self.world.initial

    def learner(self, round: int) -> Learner:
        """The client's learner in a round."""
        return self.world.learner(self.client, round)

    def export(self, folder: Path, weights: Tensors) -> None:
        """The client's adapter."""
        self.world.export(folder, self.client, weights)


def seat(world: World, client: ClientId, *, labels: bool) -> Seat:
    """A client's seat in this world.

    Args:
        labels: whether the server must be told which labels occur.
    """
    known = world.known
    facts = Facts(
        rows=known.rows[client],
        labels=tuple(known.classes) if labels else (),
        majority=known.majority[client],
        data=known.data["sha256"],
        backbone=known.backbone["sha256"],
        version=version("celora"),
    )
    return Seat(world, client, facts)


# --- Flower's simulation


class Simulation:
    """Flower's simulation on this machine. Every client has a folder in the run folder, as a site has at its site."""

    def __init__(self, workshop: Workshop, remote: Remote, root: Path) -> None:
        self.workshop, self.remote, self.root = workshop, remote, root

    def team(self, experiment: Experiment, folder: RunFolder, job: str, shelves: Mapping[ClientId, str]) -> Team:
        """As `Place.team`."""
        known = self.workshop.world(experiment).known
        clients, classes = tuple(known.clients), tuple(known.classes)
        begin = Begin(dump(experiment), experiment.label, known.backbone["sha256"], classes, clients)
        self.remote.muster(job, begin, clients, 600)

        def export(name: str) -> list[str]:
            problems = self.remote.export(clients, name)
            for client in [client for client in clients if client not in problems]:
                written = site_folder(self.root, client) / job_folder(client, job) / "adapter"
                shutil.copytree(written, adapters(folder, client), dirs_exist_ok=True)
            return lost(problems)

        kept = nothing(folder, known)
        return Team(known, self.remote, kept, list, export, dict, str(folder.path / "adapters"))


def nothing(folder: RunFolder, known: Known) -> Shelves:
    """What checkpoints keep of clients that keep their state themselves."""
    return Shelves(folder.shelves, Schema.of(known.initial), 0)


def lost(problems: Mapping[ClientId, str]) -> list[str]:
    """What to say of adapters that were not written."""
    return [f"{client}: its adapter was not written: {why}" for client, why in sorted(problems.items())]


def site_folder(root: Path, client: ClientId) -> Path:
    """Where a simulated site keeps its state."""
    return root / "sites" / hashlib.sha256(client.encode()).hexdigest()[:16]


@contextmanager
def simulated(
    experiment: Experiment, workshop: Workshop, root: Path, say: Callable[[str], None]
) -> Iterator[Simulation]:
    """Start Flower's simulation with a node for every client of the experiment."""
    from celora.engines.flower import simulation  # noqa: PLC0415  # an extra

    clients = list(workshop.federation(experiment).clients)
    where = _Simulated(str(experiment.base.resolve()), str(root.resolve()), tuple(clients))
    with simulation(len(clients), where, 1.0, root / "flower.log") as post:
        yield Simulation(workshop, Remote(post, say=say), root)


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
    workshop = _workshop()

    def enter(begin: Begin) -> Seat:
        experiment = resolve(tomllib.loads(begin.config), Path(where.base))
        return seat(workshop.world(experiment), client, labels=False)

    return Site(client, site_folder(Path(where.root), client), SIMULATED, enter, None)


@cache
def _workshop() -> Workshop:
    """One for all sites that Ray's process plays."""
    return Workshop()
