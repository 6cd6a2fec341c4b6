"""Whether a generated answer is right, or how near it comes.

    exact match    the answer equals the reference, both normalised: as text, as its first word, or its last number
    ROUGE-L        F1 of the longest common subsequence of words in lower case (C.-Y. Lin, "ROUGE", 2004)

`number` reads an answer as gsm8k's are read: what follows the last "####", else the last number of the text.
"""

import re
from collections.abc import Callable, Mapping, Sequence

_WORD = re.compile(r"[a-z0-9]+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def text(answer: str) -> str:
    """Lower case, white space collapsed, no full stop at the end.

    >>> text("  In  Paris. ")
    'in paris'
    """
    return " ".join(answer.lower().split()).rstrip(".")


def word(answer: str) -> str:
    """The first word, lower case: a label.

    >>> word("Positive, because …")
    'positive'
    """
    found = re.search(r"\w[\w-]*", answer.lower())
    return found[0] if found else ""


def number(answer: str) -> str:
    """The final number, without separators of thousands and trailing zeros; "" where there is none.

    >>> number("2 + 3 = 5, so #### 1,250.50"), number("It is 7."), number("none")
    ('1250.5', '7', '')
    """
    found = _NUMBER.findall(answer.rpartition("####")[2])
    if not found:
        return ""
    plain = found[-1].replace(",", "")
    return (plain.rstrip("0").rstrip(".") if "." in plain else plain) or "0"


NORMALISED: Mapping[str, Callable[[str], str]] = {"text": text, "word": word, "number": number}
"""By name."""


def exact(answer: str, reference: str, normalise: str) -> float:
    """1 if both are the same, normalised, and not empty; else 0."""
    expected = NORMALISED[normalise](reference)
    return float(bool(expected) and NORMALISED[normalise](answer) == expected)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1.

    >>> rouge_l("the cat sat", "the cat has sat")
    0.8571428571428571
    """
    found, expected = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    common = _common(found, expected)
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for left in one:
        before = 0
        for at, right in enumerate(two, start=1):
            before, row[at] = row[at], before + 1 if left == right else max(row[at], row[at - 1])
    return row[-1]
