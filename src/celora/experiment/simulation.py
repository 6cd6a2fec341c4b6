"""The engine "flower-sim": every client is a site of its own in Flower's simulation on this machine."""

import hashlib
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from celora.core.algorithm import ClientId
from celora.engines.remote import JobStart
from celora.engines.remote_exchange import Remote
from celora.errors import ConfigError
from celora.experiment.config import Experiment, dump, resolve
from celora.experiment.population import ResourceCache
from celora.experiment.runtimes import (
    ClientPool,
    Engine,
    JobContext,
    Runtime,
    SessionContext,
    adapter_folder,
    check_population,
    job_context,
    no_stores,
    not_written,
)
from celora.site.policy import Policy
from celora.site.site import Site, job_folder
from celora.track.folder import RunFolder

POLICY = Policy(**dict[str, Any](floor=1))
"""The policy of simulated sites, whose rows are all on this machine: whatever the algorithm declares may leave."""
WAIT = 600.0
"""Seconds to wait for the simulated sites at the beginning of a job."""


@dataclass(frozen=True)
class SimulationEngine(Engine):
    """Flower's simulation (Ray), with a node for every client of the experiment."""

    def check(self, experiment: Experiment, resources: ResourceCache) -> None:
        """As `Engine.check`."""
        if experiment.model.device_map is not None:
            why = "each of the processes that play clients has a backbone of its own, and this is too large for one"
            raise ConfigError([f"model.device_map: with the engine 'flower-sim' {why}; expected the engine 'embedded'"])
        check_population(experiment, resources)

    @contextmanager
    def open(self, session: SessionContext) -> Iterator[Runtime]:
        """As `Engine.open`."""
        from celora.engines.flower_sim import simulation  # noqa: PLC0415  # an extra

        clients = tuple(session.resources.federation(session.experiment).clients)
        sites = _SimulatedSites(str(session.experiment.base.resolve()), str(session.folder.resolve()), clients)
        with simulation(len(clients), sites, 1.0, session.folder / "flower.log") as transport:
            yield FlowerSimRuntime(session.resources, Remote(transport, log=session.log), session.folder)


class FlowerSimRuntime(Runtime):
    """Flower's simulation. Every client has a folder in the run folder, as a site has at its site."""

    def __init__(self, resources: ResourceCache, remote: Remote, root: Path) -> None:
        self.resources, self.remote, self.root = resources, remote, root

    def pool(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """As `Runtime.pool`."""
        info = self.resources.population(experiment).info
        clients = tuple(info.clients)
        start = JobStart(dump(experiment), experiment.label, info.backbone["sha256"], info.agreement, clients)
        self.remote.start_job(job, start, clients, WAIT)

        def export(name: str) -> list[str]:
            problems = self.remote.export(clients, name)
            for client in [client for client in clients if client not in problems]:
                written = site_folder(self.root, client) / job_folder(client, job) / "adapter"
                shutil.copytree(written, adapter_folder(folder, client), dirs_exist_ok=True)
            return not_written(problems)

        adapters = str(folder.path / "adapters")
        return ClientPool(info, self.remote, no_stores(folder, info), list, export, dict, adapters)


def site_folder(root: Path, client: ClientId) -> Path:
    """Where a simulated site keeps its state."""
    return root / "sites" / hashlib.sha256(client.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _SimulatedSites:
    """Position -> the site there. This goes to Ray's processes; each makes a site when it is first needed there."""

    base: str
    root: str
    clients: tuple[ClientId, ...]

    def __call__(self, position: int) -> Site:
        return _simulated_site(self, self.clients[position])


@cache
def _simulated_site(sites: _SimulatedSites, client: ClientId) -> Site:
    resources = _resources()

    def enter(start: JobStart) -> JobContext:
        experiment = resolve(tomllib.loads(start.config), Path(sites.base))
        return job_context(resources.population(experiment), client)

    return Site(client, site_folder(Path(sites.root), client), POLICY, enter, None)


@cache
def _resources() -> ResourceCache:
    """One for all sites of a process of Ray's."""
    return ResourceCache()
