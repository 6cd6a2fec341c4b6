"""The clients of an experiment: their rows, where they start, and their learners; and the manifest of it all."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from celora import data, models
from celora.core.adapters import truncated
from celora.core.algorithm import ClientId
from celora.core.learner import Learner, Split
from celora.errors import ConfigError
from celora.experiment.config import Experiment
from celora.models import ActivationCache, Backbone, BatchedForward, ModelLearner, ModelZoo, PrivateLearner, Rows
from celora.models.inputs import Inputs
from celora.rng import generator
from celora.tensors import Tensors


@dataclass(frozen=True)
class FederationInfo:
    """What the server of a job knows of its clients and of where they start.

    Attributes:
        rows: client -> split -> number of rows.
        majority: client -> test score of always answering its most frequent training class.
        excluded: client -> why it takes no part.
        initial: every weight at round 0 (private bases excepted).
        data, backbone: for the manifest.
    """

    clients: Sequence[ClientId]
    classes: Sequence[str]
    rows: Mapping[ClientId, Mapping[str, int]]
    majority: Mapping[ClientId, float | None]
    excluded: Mapping[ClientId, str]
    notices: Sequence[str]
    initial: Tensors
    device: str
    data: Mapping[str, Any]
    backbone: Mapping[str, str]


PACKAGES = ("celora", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "pydantic")


class ResourceCache:
    """Loads a data set, a backbone and token ids once, however many algorithms and seeds use them."""

    def __init__(self) -> None:
        self._backbones: dict[object, Backbone] = {}
        self._federations: dict[object, data.FederatedDataset] = {}
        self._inputs: dict[object, Inputs] = {}
        self._activations: dict[object, ActivationCache] = {}
        self._zoos: dict[object, ModelZoo] = {}

    def backbone(self, experiment: Experiment) -> Backbone:
        """The backbone, adapted where the experiment says; the rank is no matter to it, only s is."""
        model, adapter = experiment.model, experiment.adapter
        shape = (repr(model), repr(adapter.targets), adapter.layers, adapter.scaling)
        if shape not in self._backbones:
            self._backbones[shape] = models.load(model, adapter, experiment.base)
        return self._backbones[shape]

    def zoo(self, experiment: Experiment) -> ModelZoo:
        """The clients' own models."""
        drawn_as = (repr(experiment.model), experiment.plan.seed)
        if drawn_as not in self._zoos:
            self._zoos[drawn_as] = ModelZoo(experiment.model, experiment.base, experiment.plan.seed)
        return self._zoos[drawn_as]

    def federation(self, experiment: Experiment) -> data.FederatedDataset:
        """The rows, dealt to the clients."""
        dealt = (repr(experiment.data), experiment.plan.seed)
        if dealt not in self._federations:
            self._federations[dealt] = data.load(experiment.data, experiment.base, experiment.plan.seed)
        return self._federations[dealt]

    def modules(self, experiment: Experiment) -> list[tuple[int, int]]:
        """(d_out, d_in) of every adapted module."""
        if experiment.model.own is not None:
            classes = experiment.data.classes or self.federation(experiment).classes
            return [(len(classes), self.zoo(experiment).width)]
        return list(self.backbone(experiment).targets.values())

    def start(self, experiment: Experiment, classes: int) -> Tensors:
        """Every weight at round 0 as the server knows it, for so many classes; no rows are needed."""
        own = experiment.model.own is not None
        return drawn(experiment, self.zoo(experiment) if own else self.backbone(experiment), classes)

    def fingerprint(self, experiment: Experiment) -> str:
        """SHA-256 of the backbone, or of the clients' own models."""
        return (self.backbone(experiment) if experiment.model.own is None else self.zoo(experiment)).fingerprint()

    def population(self, experiment: Experiment) -> "Population":
        """The clients of an experiment, with their rows ready for its backbone."""
        federation = self.federation(experiment)
        check_quorum(experiment, len(federation.clients))
        return self.populated(experiment, federation)

    def populated(self, experiment: Experiment, federation: data.FederatedDataset, **site: Any) -> "Population":
        """The population of a dataset whose rows are given; `site` as for `Population`."""
        model, budget = experiment.model, experiment.engine.inputs_mb << 20
        reader = self.backbone(experiment) if model.own is None else self.zoo(experiment)
        read_as = (federation.table.fingerprint(), repr(model), budget)
        if read_as not in self._inputs:
            self._inputs[read_as] = reader.read(federation.table.inputs, budget)
        if isinstance(reader, ModelZoo):
            return Population(experiment, federation, reader, self._inputs[read_as], **site)
        backbone = reader
        frozen = (read_as, backbone.depth, experiment.engine.cache_mb)
        if backbone.depth and frozen not in self._activations:
            self._activations[frozen] = ActivationCache(backbone, experiment.engine.cache_mb << 20)
        passes = BatchedForward(backbone, experiment.algorithm.family, self._activations.get(frozen))
        return Population(experiment, federation, passes, self._inputs[read_as], **site)


def drawn(experiment: Experiment, backbone: Backbone | ModelZoo, classes: int, secret: int | None = None) -> Tensors:
    """Every weight at round 0; without the secret of secret bases their shapes, and values that nobody uses."""
    adapter, family, seed = experiment.adapter, experiment.algorithm.family, experiment.plan.seed
    if secret is None:
        adapter = replace(adapter, bases="shared")
    if isinstance(backbone, ModelZoo):
        return backbone.initial(adapter, family, classes, seed)
    return models.initial(backbone, adapter, family, classes, seed, secret)


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
        models: passes through the frozen backbone, or the clients' own models.
        everyone: all clients of the experiment, where the federation holds only one of them (a site).
        secret: client -> what its own bases are drawn from; none: from the run's seed, so that it can be repeated.
    """

    def __init__(
        self,
        experiment: Experiment,
        federation: data.FederatedDataset,
        models: BatchedForward | ModelZoo,
        inputs: Inputs,
        everyone: Sequence[ClientId] | None = None,
        secret: Callable[[ClientId], int] | None = None,
    ) -> None:
        self.experiment, self.federation, self.models, self._secret = experiment, federation, models, secret
        self.clients: list[ClientId] = list(federation.clients)
        self.everyone = list(everyone or self.clients)
        self.excluded: Mapping[ClientId, str] = federation.excluded
        left_out = [f"{client} is left out: {why}" for client, why in federation.excluded.items()]
        self.notices: list[str] = [*federation.table.notices, *federation.notices, *left_out, *inputs.notices]
        ids = {name: number for number, name in enumerate(federation.classes)}
        labels = torch.tensor([ids[label] for label in federation.table.labels])

        def rows(chosen: list[int]) -> Rows:
            return Rows(inputs.take(chosen), labels[chosen], torch.tensor(chosen, dtype=torch.int64))

        self.rows: dict[ClientId, dict[Split, Rows]] = {
            client: {
                "train": rows(share.train),
                "validation": rows(share.validation),
                "test": rows(share.test),
            }
            for client, share in federation.clients.items()
        }
        self.initial: Tensors = drawn(experiment, self._backbone, len(federation.classes))
        ranks = experiment.adapter.ranks
        if isinstance(ranks, Mapping) and (unknown := sorted(set(ranks) - set(self.everyone))):
            raise ConfigError(
                [f"adapter.ranks: found client {unknown[0]!r}, expected some of {', '.join(self.everyone)}"]
            )

    @property
    def _backbone(self) -> Backbone | ModelZoo:
        return self.models if isinstance(self.models, ModelZoo) else self.models.backbone

    def start(self, client: ClientId) -> Tensors:
        """The client's weights at round 0; with secret bases A (and an orthonormal B) are its own."""
        adapter = self.experiment.adapter
        if isinstance(self.models, ModelZoo):
            return {**self.models.of(client, self.everyone).start, **self.initial}
        if adapter.ranks is not None:
            return truncated(self.initial, adapter.rank_of(client, self.everyone))
        if adapter.bases == "shared":
            return self.initial
        by_seed = torch.randint(2**62, (), generator=generator(self.experiment.plan.seed, "secret", client))
        secret = self._secret(client) if self._secret else int(by_seed)
        return drawn(
            self.experiment, self._backbone, len(self.federation.classes), secret
        )  # again each round: milliseconds, and no client costs memory

    def learner(self, client: ClientId, round: int) -> Learner:
        """The client's learner in a round."""
        experiment, rows, start = self.experiment, self.rows[client], self.start(client)
        address: Any = {"seed": experiment.plan.seed, "client": client, "round": round}
        if isinstance(self.models, BatchedForward):
            return ModelLearner(self.models, rows, start, experiment.train, **address)
        adapts: Any = {"family": experiment.algorithm.family, "scaling": experiment.adapter.scaling}
        own = self.models.of(client, self.everyone)
        return PrivateLearner(own, rows, start, experiment.train, **adapts, **address)

    @property
    def known(self) -> FederationInfo:
        """What the server knows of this population."""
        table = self.federation.table
        return FederationInfo(
            clients=self.clients,
            classes=self.federation.classes,
            rows={client: {split: len(rows) for split, rows in splits.items()} for client, splits in self.rows.items()},
            majority={client: self.majority(client) for client in self.clients},
            excluded=self.excluded,
            notices=self.notices,
            initial=self.initial,
            device=str(self.models.device),
            data={"source": self.experiment.data.source, "sha256": table.fingerprint()},
            backbone={"name": self.models.name, "sha256": self.models.fingerprint()},
        )

    def majority(self, client: ClientId) -> float | None:
        """Test score of always answering the client's most frequent training class."""
        train, test = self.rows[client]["train"].labels, self.rows[client]["test"].labels
        if not len(train) or not len(test):
            return None
        return float((test == train.mode().values).float().mean())

    def export(self, folder: Path, client: ClientId, weights: Tensors) -> None:
        """A client's adapter as plain PEFT LoRA, or its own model and the adapter beside it."""
        experiment, classes = self.experiment, self.federation.classes
        if isinstance(self.models, ModelZoo):
            models.export_private(folder, self.models.of(client, self.everyone).name, weights, classes=classes)
            return
        models.export_peft(
            folder,
            self.models.backbone,
            weights,
            family=experiment.algorithm.family,
            classes=classes,
            model=experiment.model,
            adapter=experiment.adapter,
        )


def manifest(experiment: Experiment, known: FederationInfo) -> dict[str, Any]:
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
        "device": known.device,
        "seed": experiment.plan.seed,
        "data": dict(known.data),
        "backbone": dict(known.backbone),
        "classes": list(known.classes),
        "clients": {client: dict(rows) for client, rows in known.rows.items()},
    }
