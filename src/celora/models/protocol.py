"""The two protocols of this package: a `Network` turns a batch into features; `ClientModels` are what clients train.

Network         the frozen backbone with adapters handed in, or a client's own whole network
ClientModels    one backbone for all clients, or a network for each
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from celora.core.learner import Batch, Learner, Recipe, Split
from celora.core.reading import Encode, Inputs, TokenInputs, Tokenizer
from celora.core.task import Task
from celora.models.export import Exported, Format
from celora.models.rows import Rows
from celora.tensors import Tensors


class Network(Protocol):
    """A model without its head, run with the weights of whoever asks.

    Attributes:
        width: length d of a feature vector.
        capacity: tokens of the largest pass that is worth it, or fits into memory.
        dropout: whether it drops out while training; a client then draws masks for its own rows.
        joins: whether rows of several clients, with weights of each, may share a pass.
        own_head: tensors `head.*` that the network itself brings, as they start.
    """

    width: int
    own_head: Tensors
    device: torch.device
    dropout: bool
    joins: bool

    @property
    def capacity(self) -> int:
        """Tokens of the largest pass that is worth it, or fits into memory."""

    def lengths(self, inputs: Inputs, rows: Sequence[int]) -> list[int]:
        """Tokens of these rows; images are all alike."""

    def length(self, batch: Batch) -> int:
        """Tokens that every row of a batch has, filled up."""

    def pieces(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Which rows are evaluated together, each in one piece."""

    def batch(self, inputs: Inputs, rows: Sequence[int]) -> dict[str, Tensor]:
        """These rows on the CPU, filled up to one length."""

    def features(self, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """Pooled features (rows, d) under these weights; without any, those of the network before any training."""

    def outputs(self, task: Task, weights: Tensors, batch: Batch, dropout_seed: int | None = None) -> Tensor:
        """The task's outputs (rows, ...) of those features."""

    def candidates(self, task: Task, weights: Tensors) -> dict[str, Tensor]:
        """The vectors of the texts among which the task chooses an answer, `head.candidates` (n, d), if there are some.

        Args:
            weights: one client's, on the device.
        """

    def answers(
        self, weights: Tensors, prompts: Sequence[Sequence[int]], most: int, batch: Batch | None = None
    ) -> list[str]:
        """What a language model answers to each prompt, greedily, in at most so many tokens.

        Args:
            weights: with a leading client axis, if prompts are of several clients; they are then client-major.
            batch: the rows that the prompts begin, for a model that sees.
        """

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of token ids."""

    def squares(self, batch: Batch) -> Mapping[str, Tensor]:
        """Adapted module -> sum over all tokens of its squared inputs (d_in,), float64 on the CPU; nothing adapted."""


class ClientModels(Protocol):
    """What the clients of one experiment train, and with them one task."""

    @property
    def name(self) -> str:
        """As it was asked for."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know, so far."""

    def fingerprint(self) -> str:
        """SHA-256 of all weights before training, adapters and head excepted."""

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Adapted module -> (d_out, d_in)."""

    def read(self, inputs: Any) -> Inputs:
        """A column of texts or images, as `celora.core.reading.Reader`.

        Raises:
            ModelError: if the models read something else.
        """

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int]) -> Inputs:
        """As `celora.core.reading.Reader`."""

    def seen(self, rows: Any, write: Any) -> TokenInputs:
        """As `celora.core.reading.Reader`."""

    def words(self, rows: Any) -> Inputs:
        """As `celora.core.reading.Reader`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """As `celora.core.reading.Reader`."""

    def tokens(self, inputs: Any, encode: Encode) -> TokenInputs:
        """As `celora.core.reading.Reader`."""

    @property
    def initial(self) -> Tensors:
        """Every weight at round 0 as the server knows it: adapters and head, without any secret."""

    def start(self, client: str, secret: Callable[[], int]) -> Tensors:
        """Every weight of a client at round 0.

        Args:
            secret: what its own bases are drawn from, where these are secret.
        """

    def learner(self, client: str, round: int, splits: Mapping[Split, Rows], start: Tensors, recipe: Recipe) -> Learner:
        """A client in a round."""

    def predict(self, client: str, weights: Tensors, inputs: Any) -> Tensor:
        """The task's outputs (n, ...) under a client's weights, on the CPU.

        Args:
            inputs: n texts, pairs (text, pair), or images (n, channels, height, width).

        Raises:
            ModelError: if the models read something else.
        """

    def answers(self, client: str, weights: Tensors, inputs: Any) -> Sequence[Any]:
        """What a client's model answers for each of n texts, prompts or images, as the task says it.

        Raises:
            ModelError: as `predict`.
        """

    def export(
        self, folder: Path, client: str, weights: Tensors, *, format: Format = "peft", pad: bool = False
    ) -> Exported:
        """Write a client's weights so that others can load them.

        Args:
            pad: whether the rank of plain LoRA becomes one that vLLM serves.

        Raises:
            ModelError: if what stock libraries make of it is not what was trained, or there is nothing to merge.
        """
