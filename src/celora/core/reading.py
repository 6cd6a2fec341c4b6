"""Rows of a source, and how a network reads them: what a task asks of both.

Form       which columns a row is read of
Columns    the rows as a source has them
Reader     a network, as far as a task needs it to read rows
Inputs     rows as a network reads them
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from celora.tensors import Tensors

Content = Literal["text", "image", "value"]
"""What a column holds: texts; image files; or values as JSON has them, such as lists of messages."""


@dataclass(frozen=True)
class Form:
    """One way in which a source may hold the rows of a task.

    Attributes:
        roles: what a row consists of -> what the column of this name, or the one `data.columns` names, holds.
        optional: roles whose column may be absent, and its values missing.
        labelled: whether every row needs a label; otherwise labels are read where there is such a column.
    """

    roles: Mapping[str, Content]
    optional: frozenset[str] = frozenset()
    labelled: bool = True


TEXTS, IMAGES = Form({"text": "text"}), Form({"image": "image"})
PAIRS = Form({"text": "text", "pair": "text"})
"""Two texts a row; read where `data.columns` names the column of the second."""


class Columns(Protocol):
    """The columns of a data set that a task reads (`celora.data.Table`)."""

    @property
    def inputs(self) -> Any:
        """Of each row: a text, an image, or where a form has several roles a mapping of what it consists of."""

    @property
    def labels(self) -> Sequence[str]:
        """The label column of each row, as text; "" where the source has none."""

    @property
    def rows(self) -> Sequence[str]:
        """Where each row came from, for messages."""


class Inputs(Protocol):
    """Rows as a network reads them; only the network that read them looks inside."""

    def __len__(self) -> int:
        """Number of rows."""

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know of how they are read."""


class Tokenizer(Protocol):
    """What turns texts into token ids and back."""

    @property
    def start(self) -> Sequence[int]:
        """The ids that every row begins with; none, or one."""

    @property
    def end(self) -> int | None:
        """The id that ends an answer, if there is one."""

    @property
    def most(self) -> int:
        """Tokens kept of a row."""

    def ids(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Token ids of each text, special tokens neither added nor cut off."""

    def dialogue(self, messages: Sequence[Mapping[str, str]], reply: bool) -> str:
        """Messages (role, content) as one text, as the model's chat template writes them.

        Args:
            reply: whether the text is to end where an answer begins.

        Raises:
            ModelError: if the model has no chat template, or it refuses the messages.
        """


@dataclass(frozen=True)
class TokenRow:
    """A row of a language model.

    Attributes:
        ids: t token ids.
        is_target: of each token, whether it is to be predicted from those before it; never of the first.
        size: UTF-8 bytes of the text that is to be predicted.
        cut: tokens that were left out so that the row fits.
    """

    ids: Sequence[int]
    is_target: Sequence[bool]
    size: int
    cut: int = 0


Encode = Callable[[Sequence[Any]], Sequence[TokenRow]]
"""Rows of a source -> rows of a language model."""


class TokenInputs(Inputs, Protocol):
    """Rows of a language model, with what is to be predicted of them."""

    def targets(self, rows: Sequence[int]) -> Tensors:
        """`labels` (n, t) int64, -100 where a token is no target, and `bytes` (n,) int64, of some of the rows."""


class Reader(Protocol):
    """A network, as far as a task needs it to read rows."""

    def read(self, inputs: Any) -> Inputs:
        """A column of texts, pairs of texts, or images as the network reads it."""

    def captioned(self, images: Any, texts: Sequence[str], of: Sequence[int]) -> Inputs:
        """A column of images, and with each of them one of some texts.

        Args:
            of: of each row the position of its text.

        Raises:
            ModelError: if the network is no dual encoder.
        """

    def seen(self, rows: Any, write: Callable[[Any, Callable[[str], Sequence[int]]], TokenRow]) -> TokenInputs:
        """Rows with an image each.

        Args:
            write: a row without its image, and what gives the ids of the text that its image stands in or before ->
                a row of a language model.

        Raises:
            ModelError: if the network reads no images among its tokens.
        """

    def words(self, rows: Any) -> Inputs:
        """Rows of words: lists, or records that have such a list as `tokens`.

        Their batches have `word_numbers` (n, t) int64: k where the first piece of a row's k-th word is, from 1; else 0.

        Raises:
            ModelError: if the network or its tokenizer reads no words.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            ModelError: if the network reads no texts.
        """

    def tokens(self, inputs: Any, encode: Encode) -> TokenInputs:
        """A column of whatever `encode` makes rows of a language model of, when they are first needed."""
