"""Tasks that are no classification, as somebody else would add them: one class each, and a line in a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from celora.core.adapters import linear
from celora.core.learner import Batch
from celora.core.metrics import LOSS, Metric
from celora.core.reading import Columns, Reader
from celora.core.task import Examples, HeadTensor, ModelCard, Representation, Target, Task, Trait
from celora.fields import setting, settings
from celora.tensors import Tensors

VOCABULARY = 16
NO_WORD = -1


@settings
class Regress(Task):
    """A number for each row, read off its label; nothing need be agreed on, and a lower score is better."""

    scale: float = setting(1.0, "by which labels are divided")

    @property
    def traits(self) -> frozenset[Trait]:
        return frozenset({"head"})

    def read(self, columns: Columns, reader: Reader) -> Examples:
        numbers = torch.tensor([float(label) / self.scale for label in columns.labels])
        return Examples(
            reader.read(columns.inputs), lambda rows: {"y": numbers[torch.as_tensor(rows, dtype=torch.int64)]}
        )

    @property
    def targets(self) -> Mapping[str, Target]:
        return {"y": Target(filler=math.nan)}

    @property
    def metrics(self) -> Sequence[Metric]:
        return LOSS, Metric("absolute", higher_is_better=False, most=math.inf)

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        return {"head.weight": HeadTensor((1, width), 1 / math.sqrt(width)), "head.bias": HeadTensor((1,), 0.0)}

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        return linear(of.features, weights["head.weight"], weights["head.bias"]).squeeze(-1)

    def count(self, batch: Batch) -> int:
        return len(batch["y"])

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        y = batch["y"].to(outputs.device)
        real = ~y.isnan()
        squares = (outputs - y.nan_to_num()).square() * real
        if clients is None:
            return squares.sum(), real.sum()
        return squares.view(clients, -1).sum(1), real.view(clients, -1).sum(1)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        return torch.stack([outputs, batch["y"].to(outputs.device)], dim=1)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        outputs, y = outcomes.unbind(1)
        return {"loss": (outputs - y).square().mean().item(), "absolute": (outputs - y).abs().mean().item()}

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        return (test["y"] - train["y"].mean()).square().mean().item() if len(test["y"]) else None

    def answers(self, outputs: Tensor) -> list[float]:
        return [number * self.scale for number in outputs.tolist()]

    def model_card(self) -> ModelCard:
        return ModelCard(
            "numbers", 'y = {features} @ head["head.weight"].T + head["head.bias"]\n', "`y` is the number."
        )


@settings
class Level(Regress):
    """The same without any head: the mean of the features is the answer."""

    @property
    def traits(self) -> frozenset[Trait]:
        return frozenset()

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        return {}

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        return of.features.mean(-1)

    def model_card(self) -> ModelCard:
        return ModelCard("levels", "y = {features}.mean(1)\n", "`y` is the level.")


@settings
class Words(Task):
    """The words of a row's label, in any order, each one of 16 buckets: what counts is a word, not a row."""

    @property
    def traits(self) -> frozenset[Trait]:
        return frozenset({"head"})

    @property
    def metrics(self) -> Sequence[Metric]:
        return Metric("perplexity", higher_is_better=False, least=1.0, most=math.inf), LOSS

    def read(self, columns: Columns, reader: Reader) -> Examples:
        words = [[sum(word.encode()) % VOCABULARY for word in label.split()] for label in columns.labels]

        def targets(rows: Sequence[int]) -> Tensors:
            chosen = [torch.tensor(words[row], dtype=torch.int64) for row in rows]
            if not chosen:
                return {"words": torch.zeros(0, 0, dtype=torch.int64)}
            return {"words": torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=NO_WORD)}

        return Examples(reader.read(columns.inputs), targets)

    @property
    def targets(self) -> Mapping[str, Target]:
        return {"words": Target(filler=NO_WORD)}

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        return {"head.weight": HeadTensor((VOCABULARY, width), 1 / math.sqrt(width))}

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        return linear(of.features, weights["head.weight"])

    def count(self, batch: Batch) -> int:
        return int((batch["words"] != NO_WORD).sum())

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        each, counts = self._by_row(outputs, batch)
        if clients is None:
            return each.sum(), counts.sum()
        return each.view(clients, -1).sum(1), counts.view(clients, -1).sum(1)

    def _by_row(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        words = batch["words"].to(outputs.device)
        many = outputs.unsqueeze(1).expand(-1, words.shape[1], -1)
        losses = F.cross_entropy(many.flatten(0, 1), words.flatten(), reduction="none", ignore_index=NO_WORD)
        return losses.view(words.shape).sum(1), (words != NO_WORD).sum(1)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        losses, counts = self._by_row(outputs, batch)
        return torch.stack([losses, counts.to(losses.dtype)], dim=1)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        losses, counts = outcomes.double().sum(0).tolist()
        return {"loss": losses / counts, "perplexity": math.exp(losses / counts)}

    def answers(self, outputs: Tensor) -> list[int]:
        return outputs.argmax(1).tolist()

    def model_card(self) -> ModelCard:
        facts: dict[str, Any] = {"vocabulary": VOCABULARY}
        return ModelCard(
            "words", 'logits = {features} @ head["head.weight"].T\n', "`logits[:, k]` scores bucket k.", facts
        )
