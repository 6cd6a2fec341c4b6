"""Caption: what is said of an image, by a model that reads images and texts and answers in words.

    loss, perplexity, bits_per_byte, exact_match, rouge_l      as `celora.tasks.causal_lm`, of the answer

A row is an image, a prompt or none, and a completion; or an image and messages, whose first words it comes before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from celora.core.reading import Columns, Form, Inputs, Reader, Tokenizer, TokenRow
from celora.core.task import Architecture, Examples, ModelCard
from celora.errors import DataError
from celora.fields import setting, settings
from celora.tasks.causal_lm import CausalLm
from celora.tasks.prompts import pieces, token_row

FORMS: Mapping[str, Form] = {
    "messages": Form({"image": "image", "messages": "value"}, labelled=False),
    "prompt": Form({"image": "image", "prompt": "text", "completion": "text"}, frozenset({"prompt"}), labelled=False),
}
"""By name, in the order in which they are looked for."""


@settings
class Caption(CausalLm):
    """What is said of an image."""

    form: Literal["auto", "messages", "prompt"] = setting(
        "auto", "which columns hold a row; auto: the first of these that the source has"
    )
    loss_on: Literal["response"] = setting("response", "which tokens are predicted: a prompt has places of an image")

    @property
    def forms(self) -> Sequence[Form]:
        """An image, and messages or a prompt."""
        return list(FORMS.values()) if self.form == "auto" else [FORMS[self.form]]

    @property
    def architecture(self) -> Architecture:
        """A model of images and texts, with its head."""
        return "image-text"

    @property
    def read_as(self) -> str:
        """Template and targets."""
        return f"caption {self.template} {self.loss_on}"

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The tokens of each row, and which of them are predicted.

        Raises:
            ModelError: if the model reads no images with texts, or has no chat template where one is asked for.
        """
        rows = reader.seen(columns.inputs, partial(self._written, reader.tokenizer))
        return Examples(rows, rows.targets)

    def inputs(self, rows: Any, reader: Reader) -> Inputs:
        """Images and prompts, up to where the answer begins."""
        return reader.seen(rows, partial(self._written, reader.tokenizer, ended=False))

    def _written(
        self, tokenizer: Tokenizer, row: Any, see: Callable[[str], Sequence[int]], ended: bool = True
    ) -> TokenRow:
        """
        Raises:
            DataError: if no room is left for an answer.
        """
        asked = row if "messages" in row or "prompt" in row else {**row, "prompt": ""}
        asked = asked if ended else {role: value for role, value in asked.items() if role != "completion"}
        (first, *others), closed = pieces(asked, self.template, tokenizer)
        ids = [list(see(first[0])), *map(list, tokenizer.ids([text for text, _ in others]))]
        room = tokenizer.most - sum(map(len, ids[:-1])) - (closed and ended)
        if room < 1 if others else len(ids[0]) > tokenizer.most:
            raise DataError(
                f"found a row whose image and prompt are {sum(map(len, ids[: max(1, len(others))]))} tokens, expected "
                f"fewer than model.max_length = {tokenizer.most}: raise it"
            )
        cut = max(0, len(ids[-1]) - room) if others else 0
        ids[-1] = ids[-1][:room] if others else ids[-1]
        found = token_row([first, *others], closed and ended, ids, tokenizer, everything=False)
        return replace(found, cut=cut)

    def model_card(self) -> ModelCard:
        """How prompts are written."""
        return replace(super().model_card(), title="what is said of images")
