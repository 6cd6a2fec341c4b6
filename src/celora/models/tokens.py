"""Rows of a language model, and the tokenizer that a task makes them with."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from celora.core.reading import Encode, TokenRow
from celora.errors import ModelError
from celora.models.inputs import Inputs, Kept, Row, parts
from celora.models.language import ABSENT
from celora.models.loading import reason


class TextTokenizer:
    """A tokenizer of transformers (`celora.core.reading.Tokenizer`).

    Args:
        most: tokens kept of a row.
    """

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer, self.most = tokenizer, most

    @cached_property
    def start(self) -> list[int]:
        """The id that begins a text, where this tokenizer puts it there."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("")["input_ids"][:1] == [bos] else []

    @property
    def end(self) -> int | None:
        """The id that ends a text, if there is one."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special token added."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def dialogue(self, messages: Sequence[Mapping[str, str]], reply: bool) -> str:
        """As `celora.core.reading.Tokenizer`."""
        if self._tokenizer.chat_template is None:
            raise ModelError(
                "the model has no chat template, by which messages are written: choose a model that has one, or for "
                'rows of prompts and answers task.template = "plain" or "alpaca"'
            )
        try:
            found: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # a template is a program of the model's own, which may raise anything
            raise ModelError(f"the model's chat template refuses messages: {reason(error)}") from error
        bos = self._tokenizer.bos_token
        return found.removeprefix(bos) if self.start and bos else found

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens and white space around it."""
        found: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return found.strip()


class TokenRows(Inputs):
    """Rows made when they or their lengths are first asked for; ids are kept while they are among those used last.

    Args:
        encode: rows of the source -> rows of a language model.
        rows: of the source.
        budget: bytes of ids and labels in memory.

    Attributes:
        looked_at: rows that are made before training, to tell how many are cut.
    """

    kind = "text"
    looked_at = 10_000

    def __init__(self, encode: Encode, rows: Any, budget: int) -> None:
        self._encode, self._rows = encode, rows
        self._lengths = np.zeros(len(rows), dtype=np.int32)  # 0: not known yet
        self._bytes, self._cut = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int32)
        self._kept = Kept(budget)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def notices(self) -> tuple[str, ...]:  # type: ignore[override]
        """How many rows are cut, and by how much."""
        looked = min(len(self), self.looked_at)
        self.lengths(range(looked))
        cut = self._cut[:looked][self._cut[:looked] > 0]
        if not len(cut):
            return ()
        of = f"{looked:,} rows" if looked == len(self) else f"the first {looked:,} rows"
        return (
            f"{len(cut):,} of {of} do not fit into model.max_length and are cut, from the left of the prompt first: "
            f"by {int(np.median(cut)):,} tokens in the median, {int(cut.max()):,} at most",
        )

    def fetch(self, rows: Sequence[int]) -> list[Row]:
        """Token ids (t,) of each row."""
        return [row[0] for row in self._kept.rows(rows, self._made)]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens in each of these rows."""
        at = np.asarray(rows, dtype=np.int64)
        for some in parts(at[self._lengths[at] == 0].tolist()):
            self.fetch(some)
        found: list[int] = self._lengths[at].tolist()
        return found

    def targets(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """As `celora.core.reading.TokenInputs`."""
        labels = [torch.from_numpy(row[1].astype(np.int64)) for row in self._kept.rows(rows, self._made)]
        padded = pad_sequence(labels, True, ABSENT) if labels else torch.zeros(0, 0, dtype=torch.int64)
        return {"labels": padded, "bytes": torch.from_numpy(self._bytes[np.asarray(rows, dtype=np.int64)])}

    def _made(self, rows: Sequence[int]) -> Iterator[Row]:
        """(2, t) int32 of each row: ids, and labels."""
        for some in parts(rows):
            for row, made in zip(some, self._encode([self._rows[row] for row in some]), strict=True):
                self._lengths[row], self._bytes[row], self._cut[row] = len(made.ids), made.size, made.cut
                yield as_array(made)


def as_array(row: TokenRow) -> Row:
    """(2, t) int32: ids, and labels."""
    ids = np.array(row.ids, dtype=np.int32)
    return np.stack([ids, np.where(row.is_target, ids, ABSENT)])
