"""Causal language modelling: the next token, of whole texts or of answers to prompts.

    loss            −log p of the target tokens, a mean over tokens: the answer's, and the mark that ends it
    perplexity      e^loss
    bits_per_byte   Σ −log₂ p / UTF-8 bytes of what is predicted: comparable between tokenizers
    exact_match, rouge_l    of answers that are generated greedily, where `answer_tokens` asks for them

The head is the language model's own and stays frozen, so there is none to train or to send.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from celora.core.learner import Batch
from celora.core.metrics import LOSS, Metric
from celora.core.reading import Columns, Form, Reader, Tokenizer, TokenRow
from celora.core.task import Architecture, Examples, ModelCard, Representation, Target, Task
from celora.fields import setting, settings
from celora.lazy import Tensor, torch
from celora.tasks.common import ranked, summed
from celora.tasks.grading import exact, rouge_l
from celora.tasks.prompts import FORMS, Template, alpaca, pieces, token_row
from celora.tensors import Tensors

_ABSENT = -100
"""The label of a token that is no target."""
METRICS: Mapping[str, Metric] = {
    "loss": LOSS,
    "perplexity": Metric("perplexity", higher_is_better=False, least=1.0, most=math.inf),
    "bits_per_byte": Metric("bits_per_byte", higher_is_better=False, most=math.inf),
}
GENERATED: Mapping[str, Metric] = {"exact_match": Metric("exact_match"), "rouge_l": Metric("rouge_l")}
_CHAT = """\
asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
prompts = [prompt.removeprefix(tokenizer.bos_token or "") for prompt in prompts]  # the tokenizer sets it again
"""
_LARGEST = math.log(1e30)
"""Of a loss whose perplexity is written down."""


@settings
class CausalLm(Task):
    """The next token of a text, or of an answer."""

    score: Literal["loss", "perplexity", "bits_per_byte", "exact_match", "rouge_l"] = setting(
        "loss", "the metric by which rounds are chosen and clients compared; the last two need answer_tokens"
    )
    form: Literal["auto", "messages", "prompt", "instruction", "text"] = setting(
        "auto", "which columns hold a row; auto: the first of these that the source has"
    )
    template: Template = setting(
        "auto",
        "how prompts are written: as they are, in Alpaca's words, or by the model's chat template; auto: instructions "
        "in Alpaca's words, messages by the chat template, others as they are",
    )
    loss_on: Literal["response", "everything"] = setting("response", "which tokens are predicted")
    answer_tokens: int = setting(0, "generate so many tokens at most, to grade answers; 0: do not", ge=0)
    normalise: Literal["text", "word", "number"] = setting(
        "text", "what of an answer must be the same for an exact match: all of it, its first word, its last number"
    )

    def __post_init__(self) -> None:
        if self.score in GENERATED and not self.answer_tokens:
            raise ValueError(f'score = "{self.score}" needs answers: set answer_tokens, such as 64')

    @property
    def forms(self) -> Sequence[Form]:
        """Messages, prompts, instructions or texts."""
        return list(FORMS.values()) if self.form == "auto" else [FORMS[self.form]]

    @property
    def architecture(self) -> Architecture:
        """A language model with its head."""
        return "causal-lm"

    @property
    def read_as(self) -> str:
        """Template and targets."""
        return f"causal-lm {self.template} {self.loss_on}"

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that `score` names, and the others."""
        known = {**METRICS, **(GENERATED if self.answer_tokens else {})}
        return ranked(known, self.score)

    def strata(self, columns: Columns) -> Sequence[str] | None:
        """The labels, such as a domain's name, where the source has a column of them."""
        return columns.labels if any(columns.labels) else None

    def read(self, columns: Columns, reader: Reader) -> Examples:
        """The tokens of each row, and which of them are predicted.

        Raises:
            ModelError: if the model reads no texts, or has no chat template where one is asked for.
        """
        rows = reader.tokens(columns.inputs, partial(self._encoded, reader.tokenizer))
        return Examples(rows, rows.targets)

    def prompts(self, rows: Sequence[Any], tokenizer: Tokenizer) -> Sequence[Sequence[int]]:
        """Token ids up to where the answer begins; a plain text is a prompt."""
        asked = [{"prompt": row} if isinstance(row, str) and self.form != "text" else row for row in rows]
        return [row.ids for row in self._encoded(tokenizer, asked, ended=False)]

    def _encoded(self, tokenizer: Tokenizer, rows: Sequence[Any], ended: bool = True) -> list[TokenRow]:
        written = [pieces(row, self.template, tokenizer) for row in rows]
        ids = iter(tokenizer.ids([text for of, _ in written for text, _ in of]))
        return [
            token_row(of, closed and ended, [next(ids) for _ in of], tokenizer, self.loss_on == "everything")
            for of, closed in written
        ]

    @property
    def targets(self) -> Mapping[str, Target]:
        """Token ids (n, t) int64, and bytes (n,)."""
        return {"labels": Target(filler=_ABSENT, along_tokens=True), "bytes": Target(filler=0)}

    def outputs(self, of: Representation, weights: Tensors, batch: Batch) -> Tensor:
        """−log p (rows, t) of each target, 0 elsewhere."""
        return of.token_losses(batch["labels"])

    def count(self, batch: Batch) -> int:
        """Target tokens."""
        return int((batch["labels"] != _ABSENT).sum())

    def losses(self, outputs: Tensor, batch: Batch, clients: int | None) -> tuple[Tensor, Tensor]:
        """−log p, and target tokens."""
        counts = (batch["labels"] != _ABSENT).to(outputs.device, non_blocking=True)
        return summed(outputs, counts, clients)

    def outcomes(self, outputs: Tensor, batch: Batch) -> Tensor:
        """−log p, target tokens and bytes of each row, (rows, 3)."""
        counts = (batch["labels"] != _ABSENT).sum(1)
        known = [outputs.sum(1), *(one.to(outputs.device, non_blocking=True) for one in (counts, batch["bytes"]))]
        return torch.stack([one.double() for one in known], dim=1)

    def grades(self, answers: Sequence[str], references: Sequence[str]) -> Tensor:
        """Exact match and ROUGE-L of each answer, (rows, 2)."""
        pairs = list(zip(answers, references, strict=True))
        return torch.tensor([[exact(*pair, self.normalise), rouge_l(*pair)] for pair in pairs]).double()

    def measure(self, outcomes: Tensor) -> dict[str, float]:
        """All metrics."""
        loss, tokens, size, *graded = outcomes.double().sum(0).tolist()
        mean = loss / max(tokens, 1)
        found = {
            "loss": mean,
            "perplexity": math.exp(min(mean, _LARGEST)),
            "bits_per_byte": loss / math.log(2) / max(size, 1),
        }
        return found | dict(zip(GENERATED, (total / len(outcomes) for total in graded), strict=False))

    def answers(self, outputs: Tensor) -> Sequence[float]:
        """−log p of each row's targets; what the model answers is generated (`prompts`)."""
        found: list[float] = outputs.sum(1).tolist()
        return found

    def model_card(self) -> ModelCard:
        """How prompts are written."""
        title, code, said = "a causal language model", "", "Prompts are read as they are."
        match self.template:
            case "auto":
                said = "A prompt is read as it is; one that was an instruction is to be written in Alpaca's words, and "
                said += "messages are to be written by the tokenizer's chat template."
            case "alpaca":
                code = f"prompts = [{alpaca('{}')!r}.format(prompt) for prompt in prompts]\n"
                said = "Prompts are written in Alpaca's words."
            case "chat":
                code = _CHAT
                said = "Prompts are written by the tokenizer's chat template."
        return ModelCard(title, code, said, {"template": self.template, "answer_tokens": self.answer_tokens})
