"""The clients of an experiment: their rows, where they start, and their learners; and the manifest of it all."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from celora import data
from celora.core.algorithm import ClientId
from celora.core.learner import Learner, Split
from celora.core.task import Examples, Task
from celora.errors import ConfigError
from celora.experiment.config import Experiment
from celora.models.loader import ModelLoader
from celora.models.protocol import ClientModels
from celora.models.rows import Rows
from celora.rng import generator
from celora.tensors import Tensors


@dataclass(frozen=True)
class FederationInfo:
    """What the server of a job knows of its clients and of where they start.

    Attributes:
        task: as the clients have agreed on it; agreement: from which they have it.
        rows: client -> split -> number of rows.
        baseline: client -> headline on test of the best constant answer, such as its most frequent training class.
        excluded: client -> why it takes no part.
        initial: every weight at round 0 (private bases excepted).
        data, backbone: for the manifest.
    """

    clients: Sequence[ClientId]
    task: Task
    agreement: bytes
    rows: Mapping[ClientId, Mapping[str, int]]
    baseline: Mapping[ClientId, float | None]
    excluded: Mapping[ClientId, str]
    notices: Sequence[str]
    initial: Tensors
    device: str
    data: Mapping[str, Any]
    backbone: Mapping[str, str]


PACKAGES = ("celora", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "pydantic")


class ResourceCache:
    """Loads a data set, models and token ids once, however many algorithms and seeds use them."""

    def __init__(self) -> None:
        self._load = ModelLoader()
        self._federations: dict[object, data.FederatedDataset] = {}
        self._examples: dict[object, Examples] = {}

    def models(
        self, experiment: Experiment, task: Task, clients: Sequence[ClientId] = (), rows: str | None = None
    ) -> ClientModels:
        """What the clients of an experiment train, as `ModelLoader` gives it."""
        return self._load(
            experiment.model,
            task,
            adapter=experiment.adapter,
            family=experiment.algorithm.family,
            seed=experiment.plan.seed,
            base=experiment.base,
            clients=clients,
            rows=rows,
            cache_mb=experiment.engine.cache_mb,
            inputs_mb=experiment.engine.inputs_mb,
        )

    def federation(self, experiment: Experiment) -> data.FederatedDataset:
        """The rows, dealt to the clients."""
        dealt = (repr(experiment.data), repr(experiment.task), experiment.plan.seed)
        if dealt not in self._federations:
            self._federations[dealt] = data.load(
                experiment.data, experiment.base, experiment.plan.seed, experiment.task
            )
        return self._federations[dealt]

    def agreement(self, experiment: Experiment) -> bytes:
        """What clients whose rows are all here agree on."""
        return experiment.task.merge(b"", experiment.task.propose(self.federation(experiment).table))

    def modules(self, experiment: Experiment) -> Mapping[str, tuple[int, int]]:
        """Adapted module -> (d_out, d_in)."""
        task = experiment.task
        if experiment.model.own is not None:  # there the adapter is as large as the head
            task = task.agreed(self.agreement(experiment))
        return self.models(experiment, task).modules

    def fingerprint(self, experiment: Experiment) -> str:
        """SHA-256 of the backbone, or of the clients' own models."""
        return self.models(experiment, experiment.task).fingerprint()

    def population(self, experiment: Experiment) -> "Population":
        """The clients of an experiment, with their rows ready for its models."""
        federation = self.federation(experiment)
        check_quorum(experiment, len(federation.clients))
        return self.populated(experiment, federation, self.agreement(experiment))

    def populated(
        self,
        experiment: Experiment,
        federation: data.FederatedDataset,
        agreement: bytes,
        everyone: Sequence[ClientId] | None = None,
        secret: Callable[[ClientId], int] | None = None,
    ) -> "Population":
        """The population of a dataset whose rows are given.

        Args:
            everyone: all clients of the experiment, where the federation holds only one of them (a site).
            secret: client -> what its own bases are drawn from; none: from the run's seed, so that it can be repeated.
        """
        task, rows = experiment.task.agreed(agreement), federation.table.fingerprint()
        clients = list(everyone or federation.clients)
        models = self.models(experiment, task, clients, rows)
        read_as = (rows, repr(experiment.model), repr(task), experiment.engine.inputs_mb)
        if read_as not in self._examples:
            self._examples[read_as] = task.read(federation.table, models)
        ranks = experiment.adapter.ranks
        if isinstance(ranks, Mapping) and (unknown := sorted(set(ranks) - set(clients))):
            raise ConfigError([f"adapter.ranks: found client {unknown[0]!r}, expected some of {', '.join(clients)}"])
        return Population(experiment, federation, task, agreement, models, self._examples[read_as], secret)


def check_quorum(experiment: Experiment, clients: int) -> None:
    """
    Raises:
        ConfigError: if no round could ever reach the quorum.
    """
    drawn = max(1, round(experiment.plan.fraction * clients))
    if experiment.plan.quorum > drawn:
        raise ConfigError([f"plan.quorum: found {experiment.plan.quorum}, but only {drawn} clients train in a round"])


class Population:
    """Every client of one experiment: its rows, its start, and its learner in any round.

    Args:
        task: as agreed on by `agreement`.
        secret: as `ResourceCache.populated`.
    """

    def __init__(
        self,
        experiment: Experiment,
        federation: data.FederatedDataset,
        task: Task,
        agreement: bytes,
        models: ClientModels,
        examples: Examples,
        secret: Callable[[ClientId], int] | None = None,
    ) -> None:
        self.experiment, self.federation, self.models, self._secret = experiment, federation, models, secret
        self.task, self.agreement = task, agreement
        self.clients: list[ClientId] = list(federation.clients)
        self.excluded: Mapping[ClientId, str] = federation.excluded
        left_out = [f"{client} is left out: {why}" for client, why in federation.excluded.items()]
        self.notices: list[str] = [
            *federation.table.notices, *federation.notices, *left_out, *examples.inputs.notices
        ]  # fmt: skip
        self.rows: dict[ClientId, dict[Split, Rows]] = {
            client: {
                "train": Rows(examples, share.train),
                "validation": Rows(examples, share.validation),
                "test": Rows(examples, share.test),
            }
            for client, share in federation.clients.items()
        }

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0 as the server knows it."""
        return self.models.initial

    def start(self, client: ClientId) -> Tensors:
        """The client's weights at round 0."""

        def secret() -> int:
            if self._secret is not None:
                return self._secret(client)
            draw = generator(self.experiment.plan.seed, "secret", client)
            return int(torch.randint(2**62, (), generator=draw))

        return self.models.start(client, secret)

    def learner(self, client: ClientId, round: int) -> Learner:
        """The client's learner in a round."""
        recipe = self.experiment.train.in_round(round, self.experiment.plan.rounds)
        return self.models.learner(client, round, self.rows[client], self.start(client), recipe)

    @property
    def info(self) -> FederationInfo:
        """What the server knows of this population."""
        return FederationInfo(
            clients=self.clients,
            task=self.task,
            agreement=self.agreement,
            rows={client: {split: len(rows) for split, rows in splits.items()} for client, splits in self.rows.items()},
            baseline={client: self.baseline(client) for client in self.clients},
            excluded=self.excluded,
            notices=self.notices,
            initial=self.initial,
            device=str(self.models.device),
            data={"source": self.experiment.data.source, "sha256": self.federation.table.fingerprint()},
            backbone={"name": self.models.name, "sha256": self.models.fingerprint()},
        )

    def baseline(self, client: ClientId) -> float | None:
        """The headline on test of the best constant answer, as the task says."""
        train, test = (self.rows[client][split].targets for split in ("train", "test"))
        return self.task.baseline(train, test)

    def export(self, folder: Path, client: ClientId, weights: Tensors) -> None:
        """A client's adapter as plain PEFT LoRA, or its own model and the adapter beside it."""
        self.models.export(folder, client, weights)


def manifest(experiment: Experiment, info: FederationInfo) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, hashes of data and backbone, seed, hardware."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "schema": 1,
        "versions": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "device": info.device,
        "seed": experiment.plan.seed,
        "data": dict(info.data),
        "backbone": dict(info.backbone),
        **info.task.facts,
        "agreement": info.agreement.hex(),
        "clients": {client: dict(rows) for client, rows in info.rows.items()},
    }
