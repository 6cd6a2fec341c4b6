"""Classification: one class for each text, pair of texts or image, by a linear head on its features.

    logits = h Wᵀ + b        h (d,) the pooled features, W (classes, d), b (classes,)
    loss     cross entropy, a mean over rows
    score    accuracy, or another metric of the confusion matrix over a client's rows

Macro-F1 is the mean over the classes that occur among labels or answers, F1 = 2 · hits / (rows + answers) of a class;
balanced accuracy is the mean over the classes that occur among labels of hits / rows. Both are scikit-learn's.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from celora.core.learner import Batch
from celora.core.metrics import ACCURACY, LOSS, Metric
from celora.core.reading import Columns, Reader
from celora.core.task import Examples, HeadOf, ModelCard, Representation, Target, Trait
from celora.fields import setting, settings
from celora.lazy import F, Tensor, torch
from celora.tasks.classes import Named
from celora.tasks.common import logits, ranked
from celora.tensors import Tensors

_ABSENT = -100
"""The label of a row that only fills up a batch; cross entropy ignores it."""
METRICS: Mapping[str, Metric] = {
    "accuracy": ACCURACY,
    "macro_f1": Metric("macro_f1"),
    "balanced_accuracy": Metric("balanced_accuracy"),
    "loss": LOSS,
}


@settings
class Classify(Named):
    """One of several classes for each row."""

    score: Literal["accuracy", "macro_f1", "balanced_accuracy", "loss"] = setting(
        "accuracy", "the metric by which rounds are chosen and clients compared"
    )

    @property
    def traits(self) -> frozenset[Trait]:
        """Rows fall into classes, and there is a head."""
        return frozenset({"classes", "head"})

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that `score` names, and the others."""
        return ranked(METRICS, self.score)

    def strata(self, columns: Columns) -> Sequence[str]:
        """The labels."""
        return columns.labels

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The text, pair or image of each row, and the id of its class.

        Raises:
            ModelError: if the network cannot read the rows.
        """
        ids = self.ids
        labels = torch.tensor([ids[label] for label in columns.labels], dtype=torch.int64)
        return Examples(
            reader.read(columns.inputs), lambda rows: {"labels": labels[torch.as_tensor(rows, dtype=torch.int64)]}
        )

    @property
    def targets(self) -> Mapping[str, Target]:
        """Class ids (n,) int64."""
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
        """Cross entropies, and rows."""
        labels = batch["labels"].to(outputs.device, non_blocking=True)
        counts = labels != _ABSENT
        if clients is None:
            return F.cross_entropy(outputs, labels, reduction="sum", ignore_index=_ABSENT), counts.sum()
        each = F.cross_entropy(outputs, labels, reduction="none", ignore_index=_ABSENT)
        return each.view(clients, -1).sum(1), counts.view(clients, -1).sum(1)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross entropy, answer and label of each row, (rows, 3)."""
        labels = batch["labels"].to(outputs.device, non_blocking=True)
        losses = F.cross_entropy(outputs, labels, reduction="none", ignore_index=_ABSENT)
        return torch.stack([losses, outputs.argmax(1).to(losses.dtype), labels.to(losses.dtype)], dim=1)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """All of `METRICS`."""
        losses, answers, labels = outcomes.unbind(1)
        # nll_loss adds in the order of cross_entropy, so this is, to the bit, the loss of all rows in one batch
        loss = F.nll_loss(-losses.unsqueeze(1), torch.zeros(len(losses), dtype=torch.int64))
        return {**_of_answers(answers.long(), labels.long()), "loss": loss.item()}

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        """The headline on test of always answering the most frequent training class; a loss has none."""
        train_labels, labels = train["labels"], test["labels"]
        if not len(train_labels) or not len(labels):
            return None
        return _of_answers(train_labels.mode().values.expand_as(labels), labels).get(self.headline.name)

    def classes_of(self, targets: Tensors) -> Tensor:
        """Class ids (n,)."""
        return targets["labels"]

    def answers(self, outputs: Tensor) -> list[str]:
        """The name of the likeliest class of each row."""
        names = self.classes or ()
        return [names[answer] for answer in outputs.argmax(1).tolist()]

    def model_card(self) -> ModelCard:
        """Logits by name of the class."""
        return ModelCard(
            title=f"{len(self.classes or ())} classes",
            code="logits = {logits}\n",
            reading="`logits[:, k]` scores class k of `celora.json`.",
            facts=self.facts,
        )


def _of_answers(answers: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics that depend on answers alone, of class ids (n,) with n > 0.

    From the confusion matrix only its diagonal and its sums are needed.
    """
    count = int(torch.cat([answers, labels]).max()) + 1
    hits, said, true = (torch.bincount(ids, minlength=count) for ids in (labels[answers == labels], answers, labels))
    f1 = 2 * hits / (said + true)
    return {
        "accuracy": (answers == labels).float().mean().item(),
        "macro_f1": f1[said + true > 0].mean().item(),
        "balanced_accuracy": (hits / true)[true > 0].mean().item(),
    }
