"""One frozen backbone for all clients, each with adapters of its own (`celora.models.protocol`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celora.core.adapters import Family, modules, truncated
from celora.core.learner import Batch, Recipe, Split
from celora.core.reading import Encode
from celora.core.task import Representation, Task
from celora.errors import ModelError
from celora.models.activation_cache import ActivationCache
from celora.models.backbone import Backbone, computed
from celora.models.batching import BatchedForward, predict
from celora.models.dual_backbone import DualBackbone
from celora.models.export import Exported, Format, export_shared
from celora.models.families import initial
from celora.models.inputs import Inputs
from celora.models.language import ANSWER_TOKENS
from celora.models.learner import ModelLearner
from celora.models.pissa import Start
from celora.models.rows import Rows, budgeted, unlabelled, well_filled
from celora.models.seeing_backbone import SeeingBackbone
from celora.models.settings import Adapter, Model
from celora.models.slots import Update, adding, dropping, less
from celora.models.tokens import TextTokenizer, TokenRows
from celora.tensors import Tensors

_PROMPT = 2
"""Tokens of a prompt, at least: one that begins a text, and one of it."""


class AdaptedBackbone:
    """The frozen backbone with whatever adapters are handed in (a `Network`).

    Args:
        family: of the adapters.
        activations: those below the first adapted layer, by row; None where there are none to keep, because the lowest
            layer is adapted, or rows are of several data sets.
        budget: bytes of token ids or pixels in memory.
        rate: of LoRA dropout.
        start: where A and B start from the frozen weights, what adapters add is over it.
    """

    def __init__(
        self,
        backbone: Backbone | DualBackbone,
        family: Family,
        activations: ActivationCache | None = None,
        budget: int = 0,
        rate: float = 0.0,
        start: Start | None = None,
    ) -> None:
        self.backbone, self.family, self.activations = backbone, family, activations
        self.width, self.device, self.dropout = backbone.width, backbone.device, backbone.dropout or rate > 0
        self.own_head = backbone.own_head
        self.joins, self.budget, self._rate = backbone.rows_first, budget, rate
        self._start = {module: (a.to(self.device), b.to(self.device)) for module, (a, b) in (start or {}).items()}

    @property
    def capacity(self) -> int:
        """Tokens of the largest pass that is worth it (CPU) or fits into memory (CUDA)."""
        return self.backbone.capacity

    def read(self, inputs: Any) -> Inputs:
        """As `Backbone.read`."""
        return self.backbone.read(inputs, self.budget)

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int]) -> Inputs:
        """As `celora.core.reading.Reader`."""
        return self.backbone.captioned(images, texts, of, self.budget)

    def words(self, rows: Any) -> Inputs:
        """As `Backbone.words`."""
        return self.backbone.words(rows, self.budget)

    def lengths(self, inputs: Any, rows: Sequence[int]) -> list[int]:
        """Tokens of these rows; images are all alike."""
        return self.backbone.lengths(inputs, rows)

    def length(self, batch: Batch) -> int:
        """Tokens of the longest row; images are all alike."""
        return self.backbone.length(batch)

    def pieces(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows of like length, up to the capacity; others one by one, as filling them up costs more than passes do."""
        return well_filled(lengths, self.capacity)

    def batch(self, inputs: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the backbone reads of these rows; their positions, where activations are kept by them."""
        batch = self.backbone.batch(inputs, rows)
        return batch if self.activations is None else {**batch, "row": torch.as_tensor(rows)}

    def features(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """Pooled features (rows, d); of the frozen backbone where there are no weights."""
        return self._encoded(weights, batch, dropout_seed).features

    def _update(self, module: str, w: Tensors, rate: float) -> Update:
        """What is added to a module's output, over s."""
        update = adding(self.family, w)
        if rate:
            update = dropping(update, rate)
        return less(update, *self._start[module]) if module in self._start else update

    def outputs(self, task: Task, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """The task's outputs of hidden states."""
        return task.outputs(self._encoded(weights, batch, dropout_seed), weights, batch)

    def seen(self, rows: Any, write: Any) -> TokenRows:
        """As `celora.core.reading.Reader`."""
        return self.backbone.seen(rows, write, self.budget)

    def answers(
        self, weights: Tensors, prompts: Sequence[Sequence[int]], most: int, batch: Batch | None = None
    ) -> list[str]:
        """As `Backbone.answers`."""
        return self.backbone.answers(prompts, self._updates(weights), most, batch)

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        tokenizer = self.backbone.text_tokenizer
        return [tokenizer.text(ids) for ids in rows]

    def candidates(self, task: Task, weights: Tensors) -> dict[str, Tensor]:
        """As `Network.candidates`."""
        texts, found = self.backbone.tokenize(task.candidates) if task.candidates else [], dict[int, Tensor]()
        for chosen in budgeted([len(ids) for ids in texts], self.capacity):
            batch = self.backbone.text_batch([texts[at] for at in chosen])
            vectors = self._encoded(weights, batch, None).embedded("text", weights)
            found |= dict(zip(chosen, vectors, strict=True))
        return {"head.candidates": torch.stack([found[at] for at in range(len(texts))])} if texts else {}

    def _encoded(self, weights: Tensors, batch: Batch, dropout_seed: int | None) -> Representation:
        updates = self._updates(weights, 0.0 if dropout_seed is None else self._rate)
        replay = self.activations.replayed if self.activations else computed
        return self.backbone.represented(batch, updates, dropout_seed, replay)

    def _updates(self, weights: Tensors, rate: float = 0.0) -> dict[str, Update]:
        adapters = {name: self._update(name, w, rate) for name, w in modules(weights).items()}
        return adapters | self.backbone.own_updates(weights)

    def squares(self, batch: Batch) -> Mapping[str, Tensor]:
        """Adapted module -> sum over all tokens of its squared inputs (d_in,), padding and adapters aside."""
        return self.backbone.squares(batch)


class SharedBackbone:
    """One backbone for all clients (`ClientModels`).

    Args:
        model, adapter: the settings that the backbone was loaded with, but for rank and bases.
        family: of the adapters.
        clients: all clients of the experiment, which tiers of ranks are dealt to; none where only the server's side is
            asked for.
        activations: those below the first adapted layer, of the rows of one data set.
        budget: bytes of token ids or pixels in memory.
        start: where A and B start, with `adapter.init = "pissa"`.
    """

    def __init__(
        self,
        backbone: Backbone | DualBackbone,
        task: Task,
        *,
        model: Model,
        adapter: Adapter,
        family: Family,
        seed: int,
        clients: Sequence[str] = (),
        activations: ActivationCache | None = None,
        budget: int = 0,
        start: Start | None = None,
    ) -> None:
        if backbone.longest is not None and task.answer_tokens > backbone.longest - _PROMPT:
            raise ModelError(
                f"task.answer_tokens = {task.answer_tokens}, but {backbone.name} has {backbone.longest} positions for "
                f"a prompt and its answer: expected at most {backbone.longest - _PROMPT}"
            )
        self._backbone, self._start = backbone, start or {}
        self._network = AdaptedBackbone(backbone, family, activations, budget, adapter.dropout, start)
        self._forward = BatchedForward(self._network, task)
        self._task, self._model, self._adapter, self._family = task, model, adapter, family
        self._class = backbone.class_of(task.head_of)
        self._seed, self._clients, self._activations = seed, clients, activations

    @property
    def name(self) -> str:
        """The backbone's, as it was asked for."""
        return self._backbone.name

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return self._backbone.device

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know of the cache, and of the backbone."""
        return [*self._backbone.notices, *(self._activations.notices if self._activations else [])]

    def fingerprint(self) -> str:
        """The backbone's."""
        return self._backbone.fingerprint()

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Adapted module -> (d_out, d_in)."""
        return self._backbone.targets

    def read(self, inputs: Any) -> Inputs:
        """As `AdaptedBackbone.read`."""
        return self._network.read(inputs)

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int]) -> Inputs:
        """As `celora.core.reading.Reader`."""
        return self._network.captioned(images, texts, of)

    def seen(self, rows: Any, write: Any) -> TokenRows:
        """As `celora.core.reading.Reader`."""
        return self._network.seen(rows, write)

    def words(self, rows: Any) -> Inputs:
        """As `celora.core.reading.Reader`."""
        return self._network.words(rows)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The backbone's."""
        return self._backbone.text_tokenizer

    def tokens(self, inputs: Any, encode: Encode) -> TokenRows:
        """As `celora.core.reading.Reader`."""
        return TokenRows(encode, inputs, self._network.budget)

    @cached_property
    def initial(self) -> Tensors:
        """Every weight at round 0; of secret bases their shapes, and values that nobody uses."""
        return self._drawn(replace(self._adapter, bases="shared"))

    def start(self, client: str, secret: Callable[[], int]) -> Tensors:
        """Every weight of a client at round 0: at its own rank, or with its own bases, where these are secret."""
        if self._adapter.ranks is not None:
            return truncated(self.initial, self._adapter.rank_of(client, self._clients))
        if self._adapter.bases == "shared":
            return self.initial
        return self._drawn(self._adapter, secret())  # again each round: milliseconds, and no client costs memory

    def _drawn(self, adapter: Adapter, secret: int | None = None) -> Tensors:
        head = dict(self._task.head(self._backbone.width))
        if self._class and not self._class.bias:
            head.pop("head.bias", None)
        weights = initial(self._backbone.targets, adapter, self._family, head, self._seed, secret)
        for module, (a, b) in self._start.items():
            weights |= {f"{module}.A": a, f"{module}.B": b}
        return weights | dict(self._backbone.own_head)

    def learner(
        self, client: str, round: int, splits: Mapping[Split, Rows], start: Tensors, recipe: Recipe
    ) -> ModelLearner:
        """A client in a round; all share passes, unless something drops out."""
        return ModelLearner(self._forward, splits, start, recipe, seed=self._seed, client=client, round=round)

    def predict(self, client: str, weights: Tensors, inputs: Any) -> Tensor:
        """As `ClientModels.predict`; activations are not kept."""
        network = AdaptedBackbone(self._backbone, self._family, start=self._start)
        return predict(network, self._task, weights, unlabelled(self._task.inputs(inputs, self)))

    def answers(self, client: str, weights: Tensors, inputs: Any) -> Sequence[Any]:
        """As `ClientModels.answers`."""
        if self._backbone.head is None:
            return self._task.answers(self.predict(client, weights, inputs))
        network = AdaptedBackbone(self._backbone, self._family, start=self._start)
        seeing, found = isinstance(self._backbone, SeeingBackbone), dict[int, str]()
        rows: Any = self._task.inputs(inputs, self) if seeing else None
        prompts = rows.fetch(range(len(rows))) if rows else self._task.prompts(inputs, self.tokenizer)
        most = self._task.answer_tokens or ANSWER_TOKENS
        for chosen in budgeted([len(prompt) for prompt in prompts], network.capacity):
            batch = self._backbone.batch(rows, chosen) if rows else None
            answers = network.answers(weights, [prompts[at] for at in chosen], most, batch)
            found |= dict(zip(chosen, answers, strict=True))
        return [found[at] for at in range(len(prompts))]

    def export(
        self, folder: Path, client: str, weights: Tensors, *, format: Format = "peft", pad: bool = False
    ) -> Exported:
        """The client's adapter as plain PEFT LoRA, or merged."""
        return export_shared(
            folder,
            self._backbone,
            weights,
            family=self._family,
            card=self._task.model_card(),
            model=self._model,
            adapter=self._adapter,
            start=self._start,
            fits=self._class,
            format=format,
            pad=pad,
        )
