"""Rows of words, for tasks that say something of each word."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from celora.errors import ModelError
from celora.models.inputs import TokenisedTexts

_LOOKED_AT = 10_000
"""Rows that are tokenised before training, to tell how many are cut."""


class WordLists:
    """Lists of words: as they are, or the `tokens` of records."""

    kind: Literal["text"] = "text"

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> list[str]:
        match self._rows[row]:
            case {"tokens": list(words)} | list(words) if words and all(isinstance(word, str) for word in words):
                return words
            case other:
                raise ModelError(f"found {str(other)[:80]!r} at row {row + 1}; expected a list of words")


class TokenisedWords(TokenisedTexts):
    """Rows of words as the tokenizer's own `is_split_into_words` reads them, cut from the right.

    Beside the ids stands the number of the word whose first piece they are, from 1, or 0.

    Args:
        tokenizer: a fast one, which knows what word a piece is of.
        most: tokens kept of a row.
        padding: the only token of a row that would have none.
        budget: bytes of ids in memory.
    """

    second = "word_numbers"

    def __init__(self, tokenizer: Any, rows: Any, *, most: int, padding: int, budget: int) -> None:
        self._words = WordLists(rows)
        super().__init__(self._numbered, self._words, budget)
        self._tokenizer, self._most, self._padding = tokenizer, most, padding

    def _numbered(self, rows: Sequence[list[str]]) -> list[Any]:
        found = self._tokenizer(list(rows), is_split_into_words=True, truncation=True, max_length=self._most)
        made = []
        for at, ids in enumerate(found["input_ids"]):
            words = found.word_ids(at)
            begins = [word != before and word is not None for before, word in zip([None, *words], words, strict=False)]
            numbers = [word + 1 if first else 0 for word, first in zip(words, begins, strict=True)]
            made.append([ids or [self._padding], numbers or [0]])
        return made

    @cached_property
    def notices(self) -> tuple[str, ...]:  # type: ignore[override]
        """How many rows have words that do not fit."""
        looked = range(min(len(self), _LOOKED_AT))
        last = (int(row[1].max()) for row in self.fetch(looked))
        cut = sum(words < len(self._words[row]) for row, words in zip(looked, last, strict=True))
        if not cut:
            return ()
        of = f"{len(looked):,} rows" if len(looked) == len(self) else f"the first {len(looked):,} rows"
        return (f"{cut:,} of {of} do not fit into model.max_length; words at their end are neither learned nor scored",)
