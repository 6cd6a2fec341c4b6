"""How a row of a language model is written: as pieces of text, of which some are to be predicted.

    text                          all of it is predicted
    prompt, completion            the completion
    instruction, input, output    the output, after Alpaca's words (R. Taori et al., Stanford Alpaca, 2023)
    messages                      what the assistant says, as the model's own chat template writes it

The pieces of a row are tokenised one by one, so that a model is asked at exactly the tokens it was trained at.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from celora.core.reading import Form, Tokenizer, TokenRow
from celora.errors import DataError

Template = Literal["auto", "plain", "alpaca", "chat"]
Pieces = list[tuple[str, bool]]
"""Texts in order, and whether each is to be predicted."""

FORMS: Mapping[str, Form] = {
    "messages": Form({"messages": "value"}, labelled=False),
    "prompt": Form({"prompt": "text", "completion": "text"}, labelled=False),
    "instruction": Form(
        {"instruction": "text", "input": "text", "output": "text"}, frozenset({"input"}), labelled=False
    ),
    "text": Form({"text": "text"}, labelled=False),
}
"""By name, in the order in which they are looked for."""
_BEGINNING = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
_ROLES = ("system", "user", "assistant")


def alpaca(instruction: str, further: str = "") -> str:
    """Alpaca's prompt, as FlowerTune uses it, too; with some further input or without."""
    middle = f"### Input:\n{further}\n\n" if further else ""
    beginning = _BEGINNING.format(", paired with an input that provides further context" if further else "")
    return f"{beginning}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def pieces(row: Any, template: Template, tokenizer: Tokenizer) -> tuple[Pieces, bool]:
    """The pieces of a row, and whether a token that ends the answer is to follow, as the text has none.

    A row without its answer ends where the answer begins.

    Raises:
        DataError: if messages are none, or are to be written otherwise than by a chat template.
        ModelError: if a chat template is asked for and the model has none, or refuses the messages.
    """
    match row:
        case str():
            return [(row, True)], True
        case {"messages": messages}:
            if template in ("plain", "alpaca"):
                raise DataError(
                    f'found rows of messages with task.template = "{template}"; messages are written by the model\'s '
                    'chat template: expected "auto" or "chat"'
                )
            return _dialogue(_messages(messages), tokenizer), False
        case {"prompt": str(prompt)}:
            answer = row.get("completion")
        case {"instruction": str(instruction)}:
            prompt, answer = _asked(instruction, row.get("input") or "", template), row.get("output")
    if template == "chat":
        said = [{"role": "user", "content": prompt}]
        return _dialogue(said + ([{"role": "assistant", "content": answer}] if answer else []), tokenizer), False
    if template == "alpaca" and "prompt" in row:
        prompt = alpaca(prompt)
    return [(prompt, False)] + ([(answer, True)] if answer else []), True


def _asked(instruction: str, further: str, template: Template) -> str:
    if template in ("auto", "alpaca"):
        return alpaca(instruction, further)
    return f"{instruction}\n\n{further}" if further else instruction


def _messages(messages: Any) -> list[dict[str, str]]:
    """Messages of JSON.

    Raises:
        DataError: saying what was found.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f'found messages = {str(messages)[:80]}; expected a list such as [{{"role": "user", "content": "…"}}]'
        )
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            expected = f"role ({', '.join(_ROLES)}) and content, both texts"
            raise DataError(f"found the message {str(message)[:80]}; expected {expected}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _dialogue(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> Pieces:
    """The text of all messages; what the assistant says, up to the mark that ends it, is to be predicted."""
    found: Pieces = []
    written = ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.dialogue(messages[:at], reply=True) if at else ""
        said = tokenizer.dialogue(messages[: at + 1], reply=False)
        if not (asked.startswith(written) and said.startswith(asked)):
            raise DataError(
                "the model's chat template writes earlier messages anew when others follow, so it cannot be told what "
                "the assistant said: leave one answer in each row"
            )
        found += [(asked[len(written) :], False), (said[len(asked) :], True)]
        written = said
    if messages[-1]["role"] != "assistant":
        found.append((tokenizer.dialogue(messages, reply=True)[len(written) :], False))
    return [piece for piece in found if piece[0]]


def token_row(
    of: Pieces, closed: bool, ids: Sequence[Sequence[int]], tokenizer: Tokenizer, everything: bool
) -> TokenRow:
    """The tokens of a row that fits: the prompt is cut from the left, and an answer that is too long from the right.

    Args:
        closed: whether the token that ends an answer follows.
        ids: of each piece.
        everything: whether prompts are to be predicted, too.
    """
    tokens, wanted = list(tokenizer.start), [False] * len(tokenizer.start)
    for (_, is_target), some in zip(of, ids, strict=True):
        tokens += some
        wanted += [is_target or everything] * len(some)
    if closed and of[-1][1] and tokenizer.end is not None:
        tokens.append(tokenizer.end)
        wanted.append(True)
    size = sum(len(text.encode("utf-8", "replace")) for text, is_target in of if is_target or everything)
    begun, cut = len(tokenizer.start), max(0, len(tokens) - tokenizer.most)
    if cut:
        first = next((at for at, one in enumerate(wanted) if one), len(tokens))
        left = min(cut, max(0, first - begun - 1))  # at least one token stays before the first that is predicted
        kept = [*range(begun), *range(begun + left, len(tokens))][: tokenizer.most]
        before = sum(wanted)
        tokens, wanted = [tokens[at] for at in kept], [wanted[at] for at in kept]
        size = round(size * sum(wanted) / before) if before else 0
    if not tokens:
        tokens, wanted = [tokenizer.end or 0], [False]
    return TokenRow(tokens, [False, *wanted[1:]], size, cut)
