"""Contrast: images and texts that belong together, by a dual encoder such as CLIP or SigLIP.

    z_ij = s · cos(x_i, y_j) + b          x_i of an image, y_j of a text, both of one client's mini-batch

    softmax    −½ Σ_j p_ij (log softmax_j z_ij + log softmax_j z_ji)      A. Radford et al., "CLIP", ICML 2021
    sigmoid    −Σ_j log σ(±z_ij), + where i and j have equal texts        X. Zhai et al., "SigLIP", ICCV 2023

Rows whose texts are equal are no negatives of each other: p_ij is uniform over the rows with the text of row i (J. Yang
et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022). An image is classified by the text that is
nearest to it: among the prompts of all classes or, where rows have no labels, among the texts of a client's split.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from celora.core.adapters import linear
from celora.core.learner import Batch
from celora.core.metrics import ACCURACY, LOSS, Metric
from celora.core.reading import IMAGES, Columns, Form, Reader
from celora.core.task import Architecture, Examples, HeadTensor, ModelCard, Representation, Target
from celora.errors import DataError
from celora.fields import Positive, setting, settings
from celora.lazy import F, Tensor, torch
from celora.tasks.classes import Classes, Named
from celora.tasks.common import ranked, summed
from celora.tensors import Tensors
from celora.wire import unpack

CAPTIONED = Form({"image": "image", "text": "text"}, labelled=False)
METRICS: Mapping[str, Metric] = {"accuracy": ACCURACY, "loss": LOSS}
CANDIDATES = "head.candidates"
_ABSENT = -100
"""The label, or the text, of a row that only fills up a batch."""
_START = {"softmax": (1 / 0.07, 0.0), "sigmoid": (10.0, -10.0)}
"""s and b where the model has learned none: those that CLIP and SigLIP start from."""


@settings
class Contrast(Named):
    """The text that belongs to an image."""

    score: Literal["accuracy", "loss"] = setting(
        "accuracy", "the metric by which rounds are chosen and clients compared"
    )
    template: str = setting(
        "a photo of a {}", "the prompt of a class, and the text of a row without one; {} is its name"
    )
    objective: Literal["softmax", "sigmoid"] = setting("softmax", "CLIP's loss, or SigLIP's")
    temperature: Positive | None = setting(
        None, "1 / s; none: the model's own s and b, or those that CLIP and SigLIP start from"
    )

    def __post_init__(self) -> None:
        if "{}" not in self.template:
            raise ValueError(f"template: found {self.template!r}, expected a text with {{}} where a class is named")

    @property
    def forms(self) -> Sequence[Form]:
        """An image and a text; or an image and the name of its class."""
        return (CAPTIONED, IMAGES)

    @property
    def architecture(self) -> Architecture:
        """Two towers."""
        return "dual-encoder"

    @property
    def couples_rows(self) -> bool:
        """The texts of a mini-batch are what an image is told apart by."""
        return True

    @property
    def candidates(self) -> Sequence[str]:
        """The prompts of all classes."""
        return [self._prompt(name) for name in self.classes or ()]

    def _prompt(self, name: str) -> str:
        """Not by `str.format`, to which any other brace is a field."""
        return self.template.replace("{}", name)

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that `score` names, and the other."""
        return ranked(METRICS, self.score)

    def occurring(self, columns: Columns) -> Iterable[str]:
        """The labels, where rows have them.

        Raises:
            DataError: if some rows have one, and others none.
        """
        if "" in columns.labels and (named := {*columns.labels} - {""}):
            row = columns.rows[columns.labels.index("")]
            raise DataError(
                f"{row}: found no label, though others have one, such as {min(named)!r}; expected all or none"
            )
        return {*columns.labels} - {""}

    def agreed(self, agreement: bytes) -> Self:
        """With the names of all classes, sorted; none where nobody's rows have labels."""
        if self.classes is None and agreement and not unpack(Classes, agreement).names:
            return replace(self, classes=())
        return super().agreed(agreement)

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        """None of the task's."""
        return {}

    def strata(self, columns: Columns) -> Sequence[str] | None:
        """The labels, where there are some."""
        return columns.labels if any(columns.labels) else None

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The image and the text of each row, and the id of its class.

        Raises:
            DataError: if a row has no label, though other clients' rows have one.
            ModelError: if the network is no dual encoder.
        """
        if self.classes and "" in columns.labels:
            row = columns.rows[columns.labels.index("")]
            raise DataError(f"{row}: found no label, though the rows of other clients have one; expected all or none")
        captions = columns.inputs.kind == "record"
        texts = [row["text"] for row in columns.inputs] if captions else map(self._prompt, columns.labels)
        known: dict[str, int] = {}
        of = [known.setdefault(text, len(known)) for text in texts]
        ids = self.ids
        targets = {
            "texts": torch.tensor(of),
            "labels": torch.tensor([ids.get(name, _ABSENT) for name in columns.labels]),
        }

        def chosen(rows: Sequence[int]) -> Tensors:
            at = torch.as_tensor(rows, dtype=torch.int64)
            return {name: tensor[at] for name, tensor in targets.items()}

        return Examples(reader.captioned(columns.inputs, list(known), of), chosen)

    @property
    def targets(self) -> Mapping[str, Target]:
        """Ids of texts, and of classes, (n,) int64 each."""
        return {"texts": Target(filler=_ABSENT), "labels": Target(filler=_ABSENT)}

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        """Logits (rows, classes) where there are candidates; else [s x, b] and [y, 1] of each row, (rows, 2, d + 1),
        whose product is a logit.
        """
        factor, offset = _START[self.objective]
        if self.temperature is not None:
            factor = 1 / self.temperature
        elif of.similarity is not None:
            factor, offset = of.similarity
        images = _extended(factor * F.normalize(of.embedded("image", weights), dim=-1), offset)
        if CANDIDATES in weights:
            return linear(images, _extended(F.normalize(weights[CANDIDATES], dim=-1), 1.0))
        return torch.stack([images, _extended(F.normalize(of.embedded("text", weights), dim=-1), 1.0)], dim=1)

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["texts"])

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        """Losses of each client's rows among themselves, and rows."""
        ids = batch["texts"].to(outputs.device, non_blocking=True).view(clients or 1, -1)
        images, texts = outputs.view(*ids.shape, *outputs.shape[1:]).unbind(2)
        real, logits = ids != _ABSENT, images @ texts.mT
        pairs = real.unsqueeze(2) & real.unsqueeze(1)
        equal = (ids.unsqueeze(2) == ids.unsqueeze(1)) & pairs
        if self.objective == "sigmoid":
            each = -(F.logsigmoid(torch.where(equal, logits, -logits)) * pairs).sum(2)
        else:
            wanted = equal / equal.sum(2, keepdim=True).clamp(min=1)
            each = (_spread(logits, wanted, real) + _spread(logits.mT, wanted, real)) / 2
        return summed(each, real, clients)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss, answer and label of each row, (rows, 3); without labels its two vectors and its text, which are to be
        told apart among all.
        """
        if outputs.dim() == 3:
            ids = batch["texts"].to(outputs)
            return torch.cat([outputs.flatten(1), ids.unsqueeze(1)], dim=1)
        labels = batch["labels"].to(outputs.device, non_blocking=True)
        return self._answered(outputs, labels)

    def _answered(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.objective == "sigmoid":
            signs = 2 * F.one_hot(labels.clamp(min=0), logits.shape[1]) - 1
            losses = -F.logsigmoid(signs * logits).sum(1)
        else:
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=_ABSENT)
        return torch.stack([losses, logits.argmax(1).to(losses), labels.to(losses)], dim=1)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """Share of images whose own text is the nearest, and the loss among the candidates."""
        if outcomes.shape[1] > 3:
            _, texts = torch.unique(outcomes[:, -1], return_inverse=True)
            images, candidates = outcomes[:, :-1].reshape(len(outcomes), 2, -1).unbind(1)
            rows = torch.arange(len(texts))
            first = rows.new_full((int(texts.max()) + 1,), len(rows)).scatter_reduce(0, texts, rows, "amin")
            outcomes = self._answered(images @ candidates[first].mT, texts)
        losses, answers, labels = outcomes.unbind(1)
        return {"accuracy": (answers == labels).float().mean().item(), "loss": losses.mean().item()}

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        """The accuracy on test of always answering the most frequent training class; a loss has none."""
        labels = test["labels"]
        if not self.classes or self.score == "loss" or not len(train["labels"]) or not len(labels):
            return None
        return (labels == train["labels"].mode().values).float().mean().item()

    def classes_of(self, targets: Tensors) -> Tensor | None:
        """Class ids (n,), where there are classes."""
        return targets["labels"] if self.classes else None

    def answers(self, outputs: Tensor) -> Sequence[str]:
        """The name of the likeliest class of each image."""
        names = self.classes or ()
        return [names[answer] for answer in outputs.argmax(1).tolist()]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The names, and how a prompt is made of one."""
        return {**super().facts, "template": self.template}

    def model_card(self) -> ModelCard:
        """Cosines of images and prompts."""
        return ModelCard(
            "images and texts that belong together",
            f"texts = {list(self.candidates) or ['a text', 'and another one']!r}\n",
            "`cosines[i, k]` says how near image i is to text k.",
            self.facts,
        )


def _extended(vectors: Tensor, number: float) -> Tensor:
    """(..., d) -> (..., d + 1), this number being the last."""
    return F.pad(vectors, (0, 1), value=number)


def _spread(logits: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
    """Cross entropies (K, n) of logits (K, n, n) with targets of probability; rows and columns that only fill are 0."""
    columns = real.unsqueeze(1)
    logs = logits.masked_fill(~columns, -torch.inf).log_softmax(2).masked_fill(~columns, 0.0)
    return -(wanted * logs).sum(2) * real
