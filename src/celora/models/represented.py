"""What a backbone makes of a batch, as tasks read it (`celora.core.task.Representation`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from celora.errors import ModelError
from celora.models.language import LanguageHead
from celora.models.row_reader import NO_DUAL
from celora.tensors import Tensors


@dataclass(frozen=True)
class Represented:
    """Hidden states of one transformer.

    Attributes:
        name: the backbone's, for messages.
        head: of a language model.
        pool: how token vectors of a row become one.
        states: (rows, t, d).
        mask: (rows, t) of texts.
    """

    name: str
    head: LanguageHead | None
    pool: Callable[[Tensor, Tensor | None], Tensor]
    states: Tensor
    mask: Tensor | None

    @property
    def features(self) -> Tensor:
        """(rows, d)."""
        return self.pool(self.states, self.mask)

    def token_losses(self, labels: Tensor) -> Tensor:
        """As `LanguageHead.losses`.

        Raises:
            ModelError: if there is no head.
        """
        if self.head is None:
            raise ModelError(f"{self.name} is no language model, so it predicts no tokens")
        return self.head.losses(self.states, labels)

    def embedded(self, content: Literal["image", "text"], weights: Tensors) -> Tensor:
        """
        Raises:
            ModelError: always, as this is no dual encoder.
        """
        raise ModelError(NO_DUAL.format(self.name))

    @property
    def similarity(self) -> None:
        """None, likewise."""
        return
