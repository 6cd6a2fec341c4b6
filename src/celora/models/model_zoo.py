"""A network for each client, of several architectures, dealt to the clients in turn (`celora.models.protocol`).

What the clients have in common is the width d of their features, so that one small adapter beside the head fits them
all, as in pFedLoRA.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celora.core.adapters import Family
from celora.core.learner import Recipe, Split
from celora.core.reading import Encode
from celora.core.task import Task
from celora.errors import ModelError
from celora.models.batching import BatchedForward, predict
from celora.models.export import Exported, Format, export_private
from celora.models.families import initial
from celora.models.inputs import Inputs
from celora.models.learner import ModelLearner
from celora.models.private_model import FC, NO_LANGUAGE, NO_PAIRS, NO_TOKENS, PrivateModel, PrivateNetwork
from celora.models.rows import Rows, unlabelled
from celora.models.settings import Adapter, Model
from celora.models.tokens import TextTokenizer, TokenRows
from celora.tensors import Tensors


def private_models(model: Model, base: Path, seed: int) -> list[PrivateModel]:
    """The architectures that `model.own` names.

    Raises:
        ModelError: if they do not read the same kind of rows, or their features differ in width.
    """
    models = [PrivateModel(name, model, base, seed) for name in model.own or ()]
    first = models[0]
    for other in models[1:]:
        if (other.kind, other.width) != (first.kind, first.width):
            found, expected = (f"{m.name} ({m.kind}s, {m.width} features)" for m in (other, first))
            raise ModelError(f"model.own: found {found} beside {expected}: the adapter must fit them all")
    return models


class ModelZoo:
    """A network for each client (`ClientModels`).

    Args:
        models: the architectures.
        clients: all clients of the experiment, to whom the architectures are dealt; none where only the server's side
            is asked for.
        budget: bytes of token ids or pixels in memory.
    """

    def __init__(
        self,
        models: Sequence[PrivateModel],
        task: Task,
        *,
        adapter: Adapter,
        family: Family,
        seed: int,
        clients: Sequence[str] = (),
        budget: int = 0,
    ) -> None:
        self._models, self._task, self._clients, self._seed = models, task, clients, seed
        self._budget = budget
        self._adapter, self._family = adapter, family
        self._forwards = [BatchedForward(PrivateNetwork(one, family, adapter.factor), task) for one in models]

    @property
    def name(self) -> str:
        """Of all of them."""
        return ", ".join(one.name for one in self._models)

    @property
    def device(self) -> torch.device:
        """Where they run."""
        return self._models[0].device

    @property
    def notices(self) -> Sequence[str]:
        """Nothing."""
        return []

    def fingerprint(self) -> str:
        """SHA-256 over names and starting weights of all architectures."""
        digest = hashlib.sha256()
        for one in self._models:
            for name, weight in one.start.items():
                digest.update(f"{one.name} {name} {tuple(weight.shape)}\n".encode())
                digest.update(weight.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """`fc` -> (outputs, d) of the head.

        Raises:
            ModelError: if the task has no head, or not before the clients have agreed.
        """
        head = self._task.head(self._models[0].width)
        if not head:
            raise ModelError("model.own: the adapter stands beside the task's head, and there is none yet")
        return {FC: (max(tensor.shape[0] for tensor in head.values()), self._models[0].width)}

    def read(self, inputs: Any) -> Inputs:
        """As `PrivateModel.read`: all architectures read alike."""
        return self._models[0].read(inputs, self._budget)

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int]) -> Inputs:
        """
        Raises:
            ModelError: always, as networks of clients' own read images or texts.
        """
        raise ModelError(NO_PAIRS)

    def seen(self, rows: Any, write: Any) -> TokenRows:
        """As `tokenizer`."""
        raise ModelError(NO_LANGUAGE)

    def words(self, rows: Any) -> Inputs:
        """
        Raises:
            ModelError: always, as networks of clients' own make one vector of a row.
        """
        raise ModelError(NO_TOKENS)

    @property
    def tokenizer(self) -> TextTokenizer:
        """
        Raises:
            ModelError: always, as no network of a client's own is a language model.
        """
        raise ModelError(NO_LANGUAGE)

    def tokens(self, inputs: Any, encode: Encode) -> TokenRows:
        """As `tokenizer`."""
        raise ModelError(NO_LANGUAGE)

    @cached_property
    def initial(self) -> Tensors:
        """What all clients have in common at round 0: the adapter `fc.*` (B = 0), and the head."""
        head = self._task.head(self._models[0].width)
        return initial(self.modules, self._adapter, self._family, head, self._seed)

    def start(self, client: str, secret: Callable[[], int]) -> Tensors:
        """A client's own network, and what all have in common."""
        return {**self._models[self._place(client)].start, **self.initial}

    def learner(
        self, client: str, round: int, splits: Mapping[Split, Rows], start: Tensors, recipe: Recipe
    ) -> ModelLearner:
        """A client in a round; it shares passes with nobody."""
        forward = self._forwards[self._place(client)]
        return ModelLearner(forward, splits, start, recipe, seed=self._seed, client=client, round=round)

    def predict(self, client: str, weights: Tensors, inputs: Any) -> Tensor:
        """As `ClientModels.predict`."""
        network = PrivateNetwork(self._models[self._place(client)], self._family, self._adapter.factor)
        return predict(network, self._task, weights, unlabelled(self._task.inputs(inputs, self)))

    def answers(self, client: str, weights: Tensors, inputs: Any) -> Sequence[Any]:
        """As `ClientModels.answers`."""
        return self._task.answers(self.predict(client, weights, inputs))

    def export(
        self, folder: Path, client: str, weights: Tensors, *, format: Format = "peft", pad: bool = False
    ) -> Exported:
        """The client's own network and the adapter beside it."""
        name, card = self._models[self._place(client)].name, self._task.model_card()
        return export_private(folder, name, weights, card=card, format=format)

    def _place(self, client: str) -> int:
        return self._clients.index(client) % len(self._models)
