"""What clients learn: how a row becomes inputs and targets, which head is trained, and how good an answer is.

    [task] ── propose(rows) ──► a record of each client ── merge ──► the agreement ── agreed ──► a task that trains
    rows   ── read ──► Examples ── a batch ──► features ── outputs ──► losses (sum, count), or one outcome for each row
    outcomes of all rows ── measure ──► accuracy, loss, …

A task is a frozen dataclass of settings; nothing of it depends on which network computes the features. Everything that
knows what a label is stands behind this protocol: a new task is one file in `celora.tasks` and one line of its table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from celora.core.learner import Batch
from celora.core.metrics import LOSS, Metric
from celora.core.reading import IMAGES, PAIRS, TEXTS, Columns, Form, Inputs, Reader, Tokenizer
from celora.lazy import Tensor, torch
from celora.tensors import Tensors

Architecture = Literal["encoder", "causal-lm", "dual-encoder", "image-text"]
"""A transformer whose hidden states are pooled; one with its head, which predicts the next token; two transformers, of
images and of texts, whose vectors lie in one space; or one with its head that reads images among its tokens."""
Trait = Literal["classes", "head"]
"""What a task may have and an algorithm may need: rows that fall into classes; a trainable head, `head.*`."""


HeadOf = Literal["sequence", "token"]
"""What a linear head classifies: a row as a whole, or each of its tokens."""


class Representation(Protocol):
    """What a network made of a batch, under the adapters of those whose rows it holds."""

    @property
    def features(self) -> Tensor:
        """Pooled features (rows, d), float32."""

    @property
    def states(self) -> Tensor:
        """Hidden states of all tokens (rows, t, d), float32.

        Raises:
            ModelError: if the network keeps no tokens apart.
        """

    def token_losses(self, labels: Tensor) -> Tensor:
        """Negative log-likelihoods (rows, t) float32 by a language model's own head, 0 where there is no target.

        Args:
            labels: (rows, t) int64, the token id at each position that is to be predicted, else -100.

        Raises:
            ModelError: if the network is no language model.
        """

    def embedded(self, content: Literal["image", "text"], weights: Tensors) -> Tensor:
        """Vectors (rows, d) float32 of the images, or of the texts, in the space that a dual encoder has for both.

        Args:
            weights: those that the pass runs under; a head may be part of the way into that space.

        Raises:
            ModelError: if the network is no dual encoder, or the rows have no such thing.
        """

    @property
    def similarity(self) -> tuple[float, float] | None:
        """Factor and offset that make a logit of a cosine, as a dual encoder learned them; None where it has none."""


@dataclass(frozen=True)
class Examples:
    """A data set as a network reads it and a task scores it.

    Attributes:
        inputs: of all rows.
        targets: positions of n rows -> what is to be predicted of them, each tensor (n, ...): the keys of
            `Task.targets`.
    """

    inputs: Inputs
    targets: Callable[[Sequence[int]], Tensors]


@dataclass(frozen=True)
class Target:
    """A tensor of targets in a batch.

    Attributes:
        filler: its value in rows, or at tokens, that only fill up a batch; losses must not count them.
        along_tokens: whether its second axis is that of the tokens, so that it is padded and cut with them.
    """

    filler: float
    along_tokens: bool = False


@dataclass(frozen=True)
class HeadTensor:
    """A trainable tensor of the head, and how it starts: uniform in ± `bound`."""

    shape: tuple[int, ...]
    bound: float


@dataclass(frozen=True)
class ModelCard:
    """What a reader of an exported adapter needs to know of the task.

    Attributes:
        title: what the adapter is for, after "LoRA adapter for ".
        code: Python lines that make predictions of pooled features (rows, d), for which the expression `{features}`
            stands; `head` holds the head's tensors by name. A task with `head_of` makes them of the head's logits,
            `{logits}`. A language model's write `prompts` as it reads them.
        reading: a sentence that says what the predictions are.
        words: whether rows are lists of words; `{logits}` are then those of each token.
        facts: for `celora.json`.
    """

    title: str
    code: str
    reading: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    words: bool = False


class Task(Protocol):
    """A task. What has a body here is how it is for a task on which nothing need be agreed, without classes or head.

    Attributes:
        targets: name -> tensor of targets in a batch.
    """

    @property
    def forms(self) -> Sequence[Form]:
        """The forms in which a source may hold its rows; the first whose columns are there is read."""
        return (PAIRS, TEXTS, IMAGES)

    @property
    def architecture(self) -> Architecture:
        """The kind of network that learns it."""
        return "encoder"

    @property
    def read_as(self) -> str:
        """What decides how rows become inputs, beside the network; tasks that read rows alike have the same."""
        return ""

    @property
    def traits(self) -> frozenset[Trait]:
        """What an algorithm can count on."""
        return frozenset()

    @property
    def metrics(self) -> Sequence[Metric]:
        """What `measure` gives; the first is the headline, by which rounds are chosen and clients compared."""
        return (LOSS,)

    @property
    def headline(self) -> Metric:
        """The first of `metrics`."""
        return self.metrics[0]

    # --- what the clients must agree on before they train

    def propose(self, columns: Columns) -> bytes:
        """A client's part in the agreement, from its rows: a packed record, or nothing.

        Raises:
            DataError: if the rows do not fit the task.
        """
        return b""

    def merge(self, agreement: bytes, proposal: bytes) -> bytes:
        """The agreement, at first empty, with one more client's proposal; the order of clients does not matter.

        Raises:
            WireError: if the proposal cannot be read.
        """
        return agreement

    def agreed(self, agreement: bytes) -> Self:
        """The task that all clients train.

        Raises:
            DataError: if something is left open.
        """
        return self

    # --- rows

    @property
    def couples_rows(self) -> bool:
        """Whether the loss of a row depends on the other rows of its mini-batch, which is then never cut."""
        return False

    @property
    def candidates(self) -> Sequence[str]:
        """Texts among which an answer is chosen; their vectors are then `head.candidates` (n, d) when rows are scored,
        or answers asked for, made anew under the weights of each client.
        """
        return ()

    def strata(self, columns: Columns) -> Sequence[str] | None:
        """The stratum of each row: rows are dealt to clients, and split, stratum by stratum; None: there are none."""
        return None

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The rows of a data set.

        Raises:
            DataError, ModelError: if the task, or the network, cannot read them.
        """
        ...

    def inputs(self, rows: Any, reader: Reader) -> Inputs:
        """Rows without targets, for which predictions are asked."""
        return reader.read(rows)

    @property
    def targets(self) -> Mapping[str, Target]:
        """Name -> tensor of targets in a batch."""
        ...

    # --- training

    def head(self, width: int) -> Mapping[str, HeadTensor]:
        """The head on features of this width, `head.*` by name; none while it cannot be known, before the agreement."""
        return {}

    @property
    def head_of(self) -> HeadOf | None:
        """What the head classifies, if it is linear, `head.weight` (n, d) and `head.bias` (n,), and no more.

        The task then does without the bias where transformers' own class for the network does.
        """
        return None

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        """Outputs (rows, ...) of what a network made of a batch.

        Args:
            weights: the head's, each with or without a leading client axis K; rows are then client-major.
        """
        ...

    def count(self, batch: Batch) -> int:
        """What counts in one client's mini-batch: rows, or target tokens. Pieces of a batch are weighted by it."""
        ...

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        """The sum of losses, and the count of what it is over: each `()`, or `(clients,)` of client-major rows."""
        ...

    # --- evaluation

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """What is to be known of each row, (rows, m) numbers: together `measure` makes a split's metrics of them."""
        ...

    @property
    def answer_tokens(self) -> int:
        """Tokens that a model may answer with, where answers are generated to be graded; 0: they are not."""
        return 0

    def prompts(self, rows: Sequence[Any], tokenizer: Tokenizer) -> Sequence[Sequence[int]]:
        """Token ids of rows without their answer, for which a language model is asked."""
        return tokenizer.ids([str(row) for row in rows])

    def grades(self, answers: Sequence[str], references: Sequence[str]) -> Tensor:
        """What is to be known of generated answers, (rows, k) numbers: further columns of `outcomes`."""
        return torch.zeros(len(answers), 0)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """Each of `metrics`, by name, of n > 0 rows; "loss" is always among them.

        Args:
            outcomes: (n, m), in the order of the rows, whatever passes they were computed in.
        """
        ...

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        """The headline on test of the best constant answer; None where there is no such thing.

        Args:
            train, test: targets of the client's rows.
        """
        return None

    def classes_of(self, targets: Tensors) -> Tensor | None:
        """Class ids (n,) of rows with these targets; None where there are no classes."""
        return None

    def answers(self, outputs: Tensor) -> Sequence[Any]:
        """What the outputs (n, ...) answer for each row, for people: the name of a class, a number, a text."""
        ...

    # --- what is left of it

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the clients have agreed on, for the manifest."""
        return {}

    def model_card(self) -> ModelCard:
        """What an exported adapter says of the task."""
        ...
