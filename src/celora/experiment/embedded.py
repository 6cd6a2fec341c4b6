"""The engine "embedded": all clients in this process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from celora.core.algorithm import ClientId
from celora.core.client_state import KeptModel, unpacked
from celora.engines.embedded import Embedded
from celora.experiment.config import Experiment
from celora.experiment.population import ResourceCache
from celora.experiment.runtimes import ClientPool, Engine, Runtime, SessionContext, adapter_folder, check_population
from celora.track.client_stores import ClientStores
from celora.track.folder import RunFolder
from celora.wire import Schema


@dataclass(frozen=True)
class EmbeddedEngine(Engine):
    """All clients in this process, which holds their rows and their state."""

    def check(self, experiment: Experiment, resources: ResourceCache) -> None:
        """As `Engine.check`."""
        check_population(experiment, resources)

    @contextmanager
    def open(self, session: SessionContext) -> Iterator[Runtime]:
        """As `Engine.open`; there is nothing to start."""
        yield LocalRuntime(session.resources)


class LocalRuntime(Runtime):
    """All clients in this process."""

    def __init__(self, resources: ResourceCache) -> None:
        self.resources = resources

    def pool(self, experiment: Experiment, folder: RunFolder, job: str, stores: Mapping[ClientId, str]) -> ClientPool:
        """As `Runtime.pool`."""
        population = self.resources.population(experiment)
        schema = Schema.of(population.initial)
        states = ClientStores(folder.stores, schema, experiment.engine.state_mb * 2**20, stores)
        solver = experiment.engine.solver(population.models.device)
        exchange = Embedded(
            experiment.algorithm, population.learner, states, schema, *solver, channel=experiment.filters
        )

        def notices() -> list[str]:
            notes = [f"{client}: {note}" for client, lines in sorted(exchange.notes.items()) for note in lines]
            return [*notes, *population.models.notices]

        def export(name: str) -> list[str]:
            for client in population.clients:
                if (model := states.get(client, {}).get(name)) is not None:
                    weights = unpacked(KeptModel, model, schema).weights
                    population.export(adapter_folder(folder, client), client, weights)
            return []

        adapters = str(folder.path / "adapters")
        return ClientPool(population.info, exchange, states, notices, export, dict, adapters)
