"""Token classification: a tag for each word of a text, such as B-PER or NOUN, by a linear head on hidden states.

    logits = h Wᵀ + b        h (d,) the hidden state of a word's first piece, W (tags, d), b (tags,)
    loss        cross entropy, a mean over words
    accuracy    the share of words whose tag is right
    entity_f1   2 · right / (true + answered) over the entities of all rows (`celora.tasks.entities`); 0 without any

A row is a list of words. A word whose first piece does not fit into `model.max_length`, or of which a tokenizer leaves
nothing, is neither learned nor scored.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from celora.core.learner import Batch
from celora.core.metrics import ACCURACY, LOSS, Metric
from celora.core.reading import Columns, Form, Inputs, Reader
from celora.core.task import Examples, HeadOf, ModelCard, Representation, Target, Trait
from celora.errors import DataError
from celora.fields import setting, settings
from celora.lazy import F, Tensor, torch
from celora.tasks.classes import Named
from celora.tasks.common import logits, ranked, summed
from celora.tasks.entities import entities
from celora.tensors import Tensors

_ABSENT = -100
"""The tag of a word that is none, or is not scored; cross entropy ignores it."""
METRICS: Mapping[str, Metric] = {
    "entity_f1": Metric("entity_f1"),
    "accuracy": ACCURACY,
    "loss": LOSS,
}


@settings
class Tag(Named):
    """A tag for each word."""

    score: Literal["entity_f1", "accuracy", "loss"] = setting(
        "entity_f1", "the metric by which rounds are chosen and clients compared"
    )

    @property
    def forms(self) -> Sequence[Form]:
        """Two lists: words, and their tags."""
        return [Form({"tokens": "value", "tags": "value"}, labelled=False)]

    @property
    def read_as(self) -> str:
        """By words."""
        return "tag"

    @property
    def traits(self) -> frozenset[Trait]:
        """There is a head; rows fall into no classes."""
        return frozenset({"head"})

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that `score` names, and the others."""
        return ranked(METRICS, self.score)

    def occurring(self, columns: Columns) -> Iterable[str]:
        """The tags that occur.

        Raises:
            DataError: if tags are no names, or a row has not one for each word.
        """
        return {tag for at, row in enumerate(columns.inputs) for tag in _tags(row, columns, at)}

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The words of each row, and the ids of their tags.

        Raises:
            DataError: naming the row that is not as it should be.
            ModelError: if the network reads no words.
        """
        ids = self.ids
        rows = [torch.tensor([ids[tag] for tag in _tags(row, columns, at)]) for at, row in enumerate(columns.inputs)]

        def targets(chosen: Sequence[int]) -> Tensors:
            some = [rows[row] for row in chosen]
            empty = torch.zeros(0, 0, dtype=torch.int64)
            return {"tags": torch.nn.utils.rnn.pad_sequence(some, True, _ABSENT) if some else empty}

        return Examples(self.inputs(columns.inputs, reader), targets)

    def inputs(self, rows: Any, reader: Reader) -> Inputs:
        """Rows of words: lists of them, or records that have such a list as `tokens`."""
        return reader.words(rows)

    @property
    def targets(self) -> Mapping[str, Target]:
        """Ids of tags (n, words) int64."""
        return {"tags": Target(filler=_ABSENT)}

    @property
    def head_of(self) -> HeadOf:
        """Each token."""
        return "token"

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        """Logits (rows, words, tags); NaN for a word that has no piece."""
        states = of.states
        at, fits = (one.to(states.device, non_blocking=True) for one in _first_pieces(batch))
        first = states.gather(1, at.unsqueeze(2).expand(-1, -1, states.shape[2]))
        return logits(first, weights).masked_fill(~fits.unsqueeze(2), math.nan)

    def count(self, batch: Batch) -> int:
        """Words that have a piece and a tag."""
        return int((_scored(batch) != _ABSENT).sum())

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        """Cross entropies, and words."""
        each, tags = _cross_entropies(outputs, batch)
        counts = tags != _ABSENT
        return summed(each, counts, clients)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Of each row its loss, words, right words; right, answered and true entities: (rows, 6) float64."""
        each, tags = _cross_entropies(outputs, batch)
        answers, counts = outputs.nan_to_num().argmax(2), tags != _ABSENT
        known = [each.sum(1), counts.sum(1), ((answers == tags) & counts).sum(1)]
        found = torch.tensor([self._entities(*row) for row in zip(answers.tolist(), tags.tolist(), strict=True)])
        return torch.cat([torch.stack([one.double() for one in known], dim=1), found.to(each.device).double()], dim=1)

    def _entities(self, answers: Sequence[int], tags: Sequence[int]) -> tuple[int, int, int]:
        """Right, answered and true entities among the words of a row that are scored."""
        names = self.classes or ()
        at = [word for word, tag in enumerate(tags) if tag != _ABSENT]
        answered, true = (entities([names[ids[word]] for word in at]) for ids in (answers, tags))
        return len(answered & true), len(answered), len(true)

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """All of `METRICS`."""
        loss, words, right, hits, answered, true = outcomes.double().sum(0).tolist()
        return {
            "entity_f1": 2 * hits / max(answered + true, 1),
            "accuracy": right / max(words, 1),
            "loss": loss / max(words, 1),
        }

    def baseline(self, train: Tensors, test: Tensors) -> float | None:
        """The headline on test of always answering the most frequent training tag; a loss has none."""
        known, tags = train["tags"][train["tags"] != _ABSENT], test["tags"]
        if not len(known) or not len(tags) or self.score == "loss":
            return None
        answers = known.mode().values.expand_as(tags)
        right = ((answers == tags).sum(1), (tags != _ABSENT).sum(1))
        found = [self._entities(*row) for row in zip(answers.tolist(), tags.tolist(), strict=True)]
        columns = [torch.zeros(len(tags)), right[1], right[0], *torch.tensor(found).unbind(1)]
        return self.measure(torch.stack([column.double() for column in columns], dim=1))[self.score]

    def answers(self, outputs: Tensor) -> list[list[str | None]]:
        """The tag of each word, up to the last that fits; None for one of which the tokenizer leaves nothing."""
        names, found = self.classes or (), list[list[str | None]]()
        for row in outputs:
            fits = ~row.isnan().any(1)
            words = int(fits.nonzero().max()) + 1 if fits.any() else 0
            ids = row.nan_to_num().argmax(1).tolist()[:words]
            found.append([names[tag] if one else None for tag, one in zip(ids, fits.tolist(), strict=False)])
        return found

    def model_card(self) -> ModelCard:
        """Logits of tokens; the first piece of a word has the word's."""
        return ModelCard(
            title=f"{len(self.classes or ())} tags of words",
            code="logits = {logits}\n",
            reading="`logits[:, t, k]` scores tag k of `celora.json` at token t; a word's is that of its first piece, "
            "where `inputs.word_ids(row)` first has its number.",
            facts=self.facts,
            words=True,
        )


def _first_pieces(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each word the position of its first piece (rows, words) int64, and whether it has one."""
    numbers = batch["word_numbers"]
    words = batch["tags"].shape[1] if "tags" in batch else int(numbers.max())
    numbers = numbers.where(numbers <= words, 0)
    places = torch.arange(numbers.shape[1]).expand_as(numbers)
    at = torch.zeros(len(numbers), words + 1, dtype=torch.int64).scatter_(1, numbers, places)
    fits = torch.zeros(at.shape, dtype=torch.bool).scatter_(1, numbers, True)
    return at[:, 1:], fits[:, 1:]


def _scored(batch: Batch) -> Tensor:
    """The tags of words that have a piece, (rows, words)."""
    _, fits = _first_pieces(batch)
    return batch["tags"].where(fits, _ABSENT)


def _cross_entropies(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each word, 0 where it is not scored, and the tags, (rows, words) each."""
    tags = _scored(batch).to(outputs.device, non_blocking=True)
    flat = outputs.nan_to_num().flatten(0, 1)
    return F.cross_entropy(flat, tags.flatten(), reduction="none", ignore_index=_ABSENT).view_as(tags), tags


def _tags(row: Mapping[str, Any], columns: Columns, at: int) -> list[str]:
    """The tags of a row, one for each word."""
    words, tags = row["tokens"], row["tags"]
    for role, value in (("tokens", words), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            found = f"{role} = {str(value)[:80]!r}"
            raise DataError(f'{columns.rows[at]}: found {found}, expected a list of texts such as ["a", "b"]')
    if len(words) != len(tags):
        found = f"{len(words)} words and {len(tags)} tags"
        raise DataError(f"{columns.rows[at]}: found {found}, expected one tag for each word")
    return [tag.strip() for tag in tags]
