"""Regression: a number for each text, pair of texts or image, by a linear head on its features.

ŷ = mean + scale · (h Wᵀ + b)       h (d,) the pooled features, W (1, d), b (1,)
loss                ((y − ŷ) / scale)², a mean over rows
mse                 (y − ŷ)², a mean over rows, in the units of the labels
pearson, spearman   correlations of y and ŷ, or of their ranks (of ties the mean rank); 0 where one does not vary
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from celora.core.learner import Batch
from celora.core.metrics import LOSS, Metric
from celora.core.reading import Columns, Reader
from celora.core.task import Examples, HeadOf, HeadTensor, ModelCard, Representation, Target, Task, Trait
from celora.errors import DataError
from celora.fields import Positive, setting, settings
from celora.lazy import Tensor, torch
from celora.tasks import common
from celora.tasks.common import logits, ranked, summed
from celora.tensors import Tensors

METRICS: Mapping[str, Metric] = {
    "mse": Metric("mse", higher_is_better=False, most=math.inf),
    "pearson": Metric("pearson", least=-1.0),
    "spearman": Metric("spearman", least=-1.0),
    "loss": LOSS,
}


@settings
class Regress(Task):
    """A number for each row, in the label column."""

    score: Literal["mse", "pearson", "spearman", "loss"] = setting(
        "mse", "the metric by which rounds are chosen and clients compared"
    )
    mean: float = setting(0.0, "subtracted from labels before training: about their mean", allow_inf_nan=False)
    scale: Positive = setting(1.0, "what labels are then divided by: about their standard deviation")

    @property
    def traits(self) -> frozenset[Trait]:
        """There is a head."""
        return frozenset({"head"})

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that `score` names, and the others."""
        return ranked(METRICS, self.score)

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The text, pair or image of each row, and its number.

        Raises:
            DataError: naming the row whose label is no number.
            ModelError: if the network cannot read the rows.
        """
        numbers = [(_number(label, columns, at) - self.mean) / self.scale for at, label in enumerate(columns.labels)]
        y = torch.tensor(numbers, dtype=torch.float32)
        return Examples(reader.read(columns.inputs), lambda rows: {"y": y[torch.as_tensor(rows, dtype=torch.int64)]})

    @property
    def targets(self) -> Mapping[str, Target]:
        """(y − mean) / scale, (n,) float32."""
        return {"y": Target(filler=math.nan)}

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        """One output."""
        return common.head(1, width)

    @property
    def head_of(self) -> HeadOf:
        """A row as a whole."""
        return "sequence"

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        """(ŷ − mean) / scale, (rows,)."""
        return logits(of.features, weights).squeeze(-1)

    def count(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["y"])

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        """Squared errors, and rows."""
        y = batch["y"].to(outputs.device, non_blocking=True)
        counts = ~y.isnan()
        squares = (outputs - y.nan_to_num()).square() * counts
        return summed(squares, counts, clients)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Output and target of each row, (rows, 2)."""
        return torch.stack([outputs, batch["y"].to(outputs.device, non_blocking=True)], dim=1)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """All of `METRICS`."""
        outputs, y = outcomes.double().unbind(1)
        loss = (outputs - y).square().mean().item()
        return {
            "mse": loss * self.scale**2,
            "pearson": correlation(outputs, y),
            "spearman": correlation(_ranks(outputs), _ranks(y)),
            "loss": loss,
        }

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        """The headline on test of always answering the mean of the training labels; correlations have none."""
        if not len(train["y"]) or not len(test["y"]) or self.score in ("pearson", "spearman"):
            return None
        constant = train["y"].mean().expand_as(test["y"])
        return self.measure(torch.stack([constant, test["y"]], dim=1))[self.score]

    def answers(self, outputs: Tensor) -> list[float]:
        """ŷ of each row."""
        found: list[float] = (outputs.double() * self.scale + self.mean).tolist()
        return found

    def model_card(self) -> ModelCard:
        """ŷ in the units of the labels."""
        return ModelCard(
            title="a number",
            code=f"y = {self.mean!r} + {self.scale!r} * ({{logits}}).squeeze(-1)\n",
            reading="`y` is the number of each row.",
            facts={"mean": self.mean, "scale": self.scale},
        )


def _number(label: str, columns: Columns, at: int) -> float:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{columns.rows[at]}: found the label {label!r}, expected a number such as 3.5: correct or remove the row, "
            "or set `label` in [data] to a column of numbers"
        )
    return number


def correlation(one: Tensor, two: Tensor) -> float:
    """Pearson's r of n numbers each, -1 to 1; 0 where one of them does not vary.

    >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-2.0, -4.0, -6.0]))
    -1.0
    """
    if one.eq(one[0]).all() or two.eq(two[0]).all():
        return 0.0
    one, two = one.double() - one.double().mean(), two.double() - two.double().mean()
    return float((one / one.norm() @ (two / two.norm())).clamp(-1, 1))


def _ranks(numbers: Tensor) -> Tensor:
    """The rank of each of n numbers, from 1; of ties their mean rank."""
    _, inverse, counts = torch.unique(numbers, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[inverse]
