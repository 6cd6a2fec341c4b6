"""Multi-label classification: any number of classes for each text, pair of texts or image, by a linear head.

    logits = h Wᵀ + b        h (d,) the pooled features, W (classes, d), b (classes,); a class is answered where > 0
    loss                binary cross entropy, a mean over rows of the mean over classes
    micro_f1            2 · hits / (labels + answers) over all rows and classes; 0 where there are neither
    macro_f1            the mean of that over the classes that occur among labels or answers
    subset_accuracy     the share of rows all of whose classes are right

The mean over classes, not their sum, is PyTorch's own (`BCEWithLogitsLoss`): a learning rate then suits few classes and
many alike. The metrics are scikit-learn's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from celora.core.learner import Batch
from celora.core.metrics import LOSS, Metric
from celora.core.reading import IMAGES, PAIRS, TEXTS, Columns, Form, Reader
from celora.core.task import Examples, HeadOf, ModelCard, Representation, Target, Trait
from celora.errors import DataError
from celora.fields import setting, settings
from celora.lazy import F, Tensor, torch
from celora.tasks.classes import Named
from celora.tasks.common import logits, ranked, summed
from celora.tensors import Tensors

_ABSENT = -1.0
"""The labels of a row that only fills up a batch."""
METRICS: Mapping[str, Metric] = {
    "micro_f1": Metric("micro_f1"),
    "macro_f1": Metric("macro_f1"),
    "subset_accuracy": Metric("subset_accuracy"),
    "loss": LOSS,
}


@settings
class MultiLabel(Named):
    """Any number of classes for each row."""

    score: Literal["micro_f1", "macro_f1", "subset_accuracy", "loss"] = setting(
        "micro_f1", "the metric by which rounds are chosen and clients compared"
    )
    separator: str | None = setting(
        None, 'what stands between labels in the label column, such as ";"; none: `labels` is a column of lists',
        min_length=1,
    )  # fmt: skip

    @property
    def forms(self) -> Sequence[Form]:
        """Pairs, texts or images, with a column of lists, or with a label column; a row may have no label."""
        if self.separator is not None:
            return [replace(form, labelled=False) for form in (PAIRS, TEXTS, IMAGES)]
        return [
            Form({**form.roles, "labels": "value"}, frozenset({"labels"}), labelled=False)
            for form in (PAIRS, TEXTS, IMAGES)
        ]

    @property
    def traits(self) -> frozenset[Trait]:
        """There is a head; rows fall into no classes of their own."""
        return frozenset({"head"})

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that `score` names, and the others."""
        return ranked(METRICS, self.score)

    def occurring(self, columns: Columns) -> Iterable[str]:
        """The labels that occur.

        Raises:
            DataError: if labels are no names, or no row has any.
        """
        found = {name for names in self._names(columns) for name in names}
        if not found and len(columns.labels):
            where = "the column `label`" if self.separator else "lists in the column `columns.labels`"
            raise DataError(f"no row has any label; expected {where} of [data] to hold some")
        return found

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The text, pair or image of each row, and whether it has each class.

        Raises:
            DataError: naming the row whose labels are no names.
            ModelError: if the network cannot read the rows.
        """
        ids = self.ids
        labels = torch.zeros(len(columns.labels), len(ids), dtype=torch.bool)
        for at, names in enumerate(self._names(columns)):
            labels[at, [ids[name] for name in names]] = True
        return Examples(
            reader.read(columns.inputs),
            lambda rows: {"labels": labels[torch.as_tensor(rows, dtype=torch.int64)].float()},
        )

    def _names(self, columns: Columns) -> list[list[str]]:
        """The labels of each row."""
        if self.separator is not None:
            split = (label.split(self.separator) for label in columns.labels)
            return [[name for part in parts if (name := part.strip())] for parts in split]
        return [_listed(row.get("labels", []), columns, at) for at, row in enumerate(columns.inputs)]

    @property
    def targets(self) -> Mapping[str, Target]:
        """1 where a row has a class, else 0, (n, classes) float32."""
        return {"labels": Target(filler=_ABSENT)}

    @property
    def head_of(self) -> HeadOf:
        """A row as a whole."""
        return "sequence"

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        """Logits (rows, classes)."""
        return logits(of.features, weights)

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["labels"])

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        """Binary cross entropies, a mean over classes, and rows."""
        labels = batch["labels"].to(outputs.device, non_blocking=True)
        counts = labels[:, 0] >= 0
        each = _cross_entropy(outputs, labels) * counts
        return summed(each, counts, clients)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss, answers (classes) and labels (classes) of each row, (rows, 1 + 2 classes)."""
        labels = batch["labels"].to(outputs.device, non_blocking=True)
        return torch.cat([_cross_entropy(outputs, labels).unsqueeze(1), (outputs > 0).to(labels), labels], dim=1)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """All of `METRICS`."""
        answers, labels = outcomes[:, 1:].bool().chunk(2, dim=1)
        hits, all_of = (answers & labels).sum(0).double(), (answers.sum(0) + labels.sum(0)).double()
        f1 = (2 * hits / all_of)[all_of > 0]
        return {
            "micro_f1": (2 * hits.sum() / all_of.sum().clamp(min=1)).item(),
            "macro_f1": f1.mean().item() if len(f1) else 0.0,
            "subset_accuracy": (answers == labels).all(1).double().mean().item(),
            "loss": outcomes[:, 0].double().mean().item(),
        }

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        """Subset accuracy on test of always answering the most frequent set of training labels; others have none."""
        if not len(train["labels"]) or not len(test["labels"]) or self.score != "subset_accuracy":
            return None
        sets, counts = torch.unique(train["labels"], dim=0, return_counts=True)
        right: Tensor = (test["labels"] == sets[counts.argmax()]).all(1)
        return right.double().mean().item()

    def answers(self, outputs: Tensor) -> list[list[str]]:
        """The names of the classes of each row."""
        names = self.classes or ()
        return [[name for name, has in zip(names, row, strict=True) if has] for row in (outputs > 0).tolist()]

    def model_card(self) -> ModelCard:
        """Logits by name of the class."""
        return ModelCard(
            title=f"any of {len(self.classes or ())} classes",
            code="logits = {logits}\n",
            reading="Where `logits[:, k] > 0` a row has class k of `celora.json`.",
            facts=self.facts,
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,): a mean over classes."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _listed(value: Any, columns: Columns, at: int) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise DataError(
            f'{columns.rows[at]}: found labels = {str(value)[:80]!r}, expected a list of names such as ["a", "b"]; '
            "set task.separator where they stand in one text"
        )
    return [name.strip() for name in value]
