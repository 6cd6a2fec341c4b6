"""The clients of an experiment: their rows, where they start, and their learners; and the manifest of it all."""

import platform
from collections.abc import Mapping
from dataclasses import replace
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
from celora.models import Backbone, ModelLearner, OwnLearner, Passes, Prefixes, Rows, Zoo
from celora.rng import generator
from celora.tensors import Tensors

PACKAGES = ("celora", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "pydantic")


class Workshop:
    """Loads a data set, a backbone and token ids once, however many algorithms and seeds use them."""

    def __init__(self) -> None:
        self._backbones: dict[object, Backbone] = {}
        self._federations: dict[object, data.Federation] = {}
        self._inputs: dict[object, Any] = {}
        self._prefixes: dict[object, Prefixes] = {}
        self._zoos: dict[object, Zoo] = {}

    def backbone(self, experiment: Experiment) -> Backbone:
        """The backbone, adapted where the experiment says; the rank is no matter to it, only s is."""
        model, adapter = experiment.model, experiment.adapter
        shape = (repr(model), repr(adapter.targets), adapter.layers, adapter.scaling)
        if shape not in self._backbones:
            self._backbones[shape] = models.load(model, adapter, experiment.base)
        return self._backbones[shape]

    def zoo(self, experiment: Experiment) -> Zoo:
        """The clients' own models."""
        drawn_as = (repr(experiment.model), experiment.plan.seed)
        if drawn_as not in self._zoos:
            self._zoos[drawn_as] = Zoo(experiment.model, experiment.base, experiment.plan.seed)
        return self._zoos[drawn_as]

    def federation(self, experiment: Experiment) -> data.Federation:
        """The rows, dealt to the clients."""
        dealt = (repr(experiment.data), experiment.plan.seed)
        if dealt not in self._federations:
            self._federations[dealt] = data.load(experiment.data, experiment.base, experiment.plan.seed)
        return self._federations[dealt]

    def modules(self, experiment: Experiment) -> list[tuple[int, int]]:
        """(d_out, d_in) of every adapted module."""
        if experiment.model.own is not None:
            return [(len(self.federation(experiment).classes), self.zoo(experiment).width)]
        return list(self.backbone(experiment).targets.values())

    def world(self, experiment: Experiment) -> "World":
        """The clients of an experiment, with their rows ready for its backbone."""
        model, plan, federation = experiment.model, experiment.plan, self.federation(experiment)
        drawn = max(1, round(plan.fraction * len(federation.clients)))
        if plan.quorum > drawn:
            raise ConfigError([f"plan.quorum: found {plan.quorum}, but only {drawn} clients train in a round"])
        read_as = (federation.table.fingerprint(), repr(model))
        if model.own is not None:
            zoo = self.zoo(experiment)
            if read_as not in self._inputs:
                self._inputs[read_as] = zoo.read(federation.table.inputs)
            return World(experiment, federation, zoo, self._inputs[read_as])
        backbone = self.backbone(experiment)
        if read_as not in self._inputs:
            inputs = federation.table.inputs
            ready = inputs if isinstance(inputs, torch.Tensor) else backbone.tokenize(inputs)
            backbone.check(ready)
            self._inputs[read_as] = ready
        frozen = (read_as, backbone.depth, experiment.engine.cache_mb)
        if backbone.depth and frozen not in self._prefixes:
            self._prefixes[frozen] = Prefixes(backbone, experiment.engine.cache_mb << 20)
        passes = Passes(backbone, experiment.algorithm.family, self._prefixes.get(frozen))
        return World(experiment, federation, passes, self._inputs[read_as])


class World:
    """Every client of one experiment: its rows, its start, and its learner in any round.

    Args:
        models: passes through the frozen backbone, or the clients' own models.
    """

    def __init__(self, experiment: Experiment, federation: data.Federation, models: Passes | Zoo, inputs: Any) -> None:
        self.experiment, self.federation, self.models = experiment, federation, models
        self.clients: list[ClientId] = list(federation.clients)
        self.excluded: Mapping[ClientId, str] = federation.excluded
        left_out = [f"{client} is left out: {why}" for client, why in federation.excluded.items()]
        self.notices: list[str] = [*federation.table.notices, *federation.notices, *left_out]
        ids = {name: number for number, name in enumerate(federation.classes)}
        labels = torch.tensor([ids[label] for label in federation.table.labels])

        def rows(chosen: list[int]) -> Rows:
            picked = inputs[chosen] if isinstance(inputs, torch.Tensor) else [inputs[row] for row in chosen]
            return Rows(picked, labels[chosen], torch.tensor(chosen, dtype=torch.int64))

        self.rows: dict[ClientId, dict[Split, Rows]] = {
            client: {
                "train": rows(share.train),
                "validation": rows(share.validation),
                "test": rows(share.test),
            }
            for client, share in federation.clients.items()
        }
        self.initial: Tensors = self._initial()
        ranks = experiment.adapter.ranks
        if isinstance(ranks, Mapping) and (unknown := sorted(set(ranks) - set(self.clients))):
            raise ConfigError(
                [f"adapter.ranks: found client {unknown[0]!r}, expected some of {', '.join(self.clients)}"]
            )

    def _initial(self, secret: int | None = None) -> Tensors:
        adapter = self.experiment.adapter
        if secret is None:  # what the server knows: of secret bases their shapes, and values nobody uses
            adapter = replace(adapter, bases="shared")
        family, classes, seed = (
            self.experiment.algorithm.family,
            len(self.federation.classes),
            self.experiment.plan.seed,
        )
        if isinstance(self.models, Zoo):
            return self.models.initial(adapter, family, classes, seed)
        return models.initial(self.models.backbone, adapter, family, classes, seed, secret)

    def start(self, client: ClientId) -> Tensors:
        """The client's weights at round 0; with secret bases A (and an orthonormal B) are its own.

        In this simulation the secret is drawn from the run's seed, so that the run can be repeated; a real site draws
        it from its own.
        """
        adapter = self.experiment.adapter
        if isinstance(self.models, Zoo):
            return {**self.models.of(client, self.clients).start, **self.initial}
        if adapter.ranks is not None:
            return truncated(self.initial, adapter.rank_of(client, self.clients))
        if adapter.bases == "shared":
            return self.initial
        drawn = torch.randint(2**62, (), generator=generator(self.experiment.plan.seed, "secret", client))
        return self._initial(secret=int(drawn))  # drawn again each round: milliseconds, and no client costs memory

    def learner(self, client: ClientId, round: int) -> Learner:
        """The client's learner in a round."""
        experiment, rows, start = self.experiment, self.rows[client], self.start(client)
        address: Any = {"seed": experiment.plan.seed, "client": client, "round": round}
        if isinstance(self.models, Passes):
            return ModelLearner(self.models, rows, start, experiment.train, **address)
        adapts: Any = {"family": experiment.algorithm.family, "scaling": experiment.adapter.scaling}
        own = self.models.of(client, self.clients)
        return OwnLearner(own, rows, start, experiment.train, **adapts, **address)

    def majority(self, client: ClientId) -> float | None:
        """Test score of always answering the client's most frequent training class."""
        train, test = self.rows[client]["train"].labels, self.rows[client]["test"].labels
        if not len(train) or not len(test):
            return None
        return float((test == train.mode().values).float().mean())

    def export(self, folder: Path, client: ClientId, weights: Tensors) -> None:
        """A client's adapter as plain PEFT LoRA, or its own model and the adapter beside it."""
        experiment, classes = self.experiment, self.federation.classes
        if isinstance(self.models, Zoo):
            models.export_own(folder, self.models.of(client, self.clients).name, weights, classes=classes)
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


def manifest(experiment: Experiment, world: World) -> dict[str, Any]:
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
        "device": str(world.models.device),
        "seed": experiment.plan.seed,
        "data": {"source": experiment.data.source, "sha256": world.federation.table.fingerprint()},
        "backbone": {"name": world.models.name, "sha256": world.models.fingerprint()},
        "classes": world.federation.classes,
        "clients": {
            client: {split: len(rows) for split, rows in splits.items()} for client, splits in world.rows.items()
        },
    }
