"""What a score is: which metric it is of, whether higher is better, and which values it can have."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number that says how good predictions are.

    Attributes:
        name: its key among a task's metrics.
        higher_is_better: its direction.
        least, most: its range, ends included; infinite where there is no bound.
    """

    name: str
    higher_is_better: bool = True
    least: float = 0.0
    most: float = 1.0

    def admits(self, value: float) -> bool:
        """Whether this metric can have the value."""
        return math.isfinite(value) and self.least <= value <= self.most

    @property
    def range(self) -> str:
        """The values it can have, for a message.

        >>> ACCURACY.range, LOSS.range
        ('0 to 1', 'a finite number, 0 or more')
        """
        if math.isfinite(self.most):
            return f"{self.least:g} to {self.most:g}"
        return "a finite number" + (f", {self.least:g} or more" if math.isfinite(self.least) else "")

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is than `over`; negative where it is worse.

        >>> ACCURACY.gain(0.75, over=0.5), LOSS.gain(0.75, over=0.5)
        (0.25, -0.25)
        """
        return value - over if self.higher_is_better else over - value

    def goodness(self, value: float) -> float:
        """A number that is higher for a better value: the key to sort by."""
        return value if self.higher_is_better else -value

    def worst(self, values: Iterable[float]) -> float:
        """The worst of several values."""
        return min(values, key=self.goodness)


ACCURACY = Metric("accuracy")
LOSS = Metric("loss", higher_is_better=False, most=math.inf)
