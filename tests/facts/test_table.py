"""The table of `celora list`: what each card says is what crosses (methods.md 21; part V, 11).

Every algorithm runs on the toy federation (one layer, d = 6, k = 8, r = 4); bytes are those of frames that were built.
"""

import re
from collections.abc import Callable
from functools import cache

import pytest

from celora.algorithms import ALGORITHMS
from celora.core.messages import Plan, Round
from tests.toy import D_IN, D_OUT, RANK, Federation, tensors_in

ROUNDS, FIRST = 6, 3
"""Rounds 3 to 6 are measured: an even number, for methods that take turns, after what is sent once has been sent."""
NOTHING = ("nothing", "–")
OTHERWISE: dict[str, tuple[str, float]] = {
    "hetlora": ("clients prune their ranks; a sixteenth of all has gone by then", 4 * (6 + 8) * 15 / 16),
    "fed-hello": (
        "the toy has one layer, which everybody trains; in round 6 of the four its F goes up",
        4 * (6 + 8) + 1 / 4,
    ),
    "she-lora": ("a ciphertext of 120 KiB, and 8 bytes by which a wrong key is found", 4 * (6 + 8) + 120 * 256 + 2),
}
"""name -> why the numbers sent follow from more than r, d and k, and how many they are on the toy federation."""
HEADS = {"ravan"}
"""Algorithms whose parts are numbered by head: C1 and C2 are spoken of as C_h."""
ALSO: dict[str, set[str]] = {}
"""name -> letters of parts that `sends` speaks of although no weight of that name travels."""

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@cache
def ran(name: str) -> tuple[tuple[Round, ...], Federation]:
    """The rounds, and the federation afterwards."""
    federation = Federation(ALGORITHMS[name]())
    return tuple(federation.run(Plan(rounds=ROUNDS))), federation


def payloads(name: str, direction: str) -> list[int]:
    """Adapter bytes of every client in every measured round."""
    rounds = ran(name)[0][FIRST - 1 : ROUNDS]
    return [getattr(traffic, f"{direction}_payload") for rnd in rounds for traffic in rnd.traffic.values()]


def formula(text: str) -> Callable[[int, int, int], float] | None:
    """A formula in r, d and k as a function of them; None if it speaks of anything else."""
    if not re.fullmatch(r"[rdk0-9+\-·/() ²]+", text):
        return None
    spaced = re.sub(r"\s*([+\-/])\s*", r"\1", text.replace("²", "**2").replace("·", " "))
    product = re.sub(r"(?<=[rdk0-9)])\s*(?=[rdk(])", "*", spaced.strip())
    code = compile(product, text, "eval")
    return lambda r, d, k: eval(code, {"r": r, "d": d, "k": k})


def names(letter: str, text: str) -> bool:
    """Whether a text names a part: `C`, `C_i` and `C̄_i` name C, `C2` does not."""
    return re.search(rf"(?<![A-Za-z0-9]){letter}(?![A-Za-z0-9])", text) is not None


def spoken(name: str, part: str) -> str:
    """What a card calls a part."""
    return part.rstrip("0123456789") if name in HEADS else part


@every_algorithm
def test_as_many_numbers_go_up_as_the_card_says(name: str) -> None:
    sent = payloads(name, "up")
    expected = OTHERWISE[name][1] if name in OTHERWISE else ALGORITHMS[name].info.floats(RANK, D_IN, D_OUT)
    assert sum(sent) / len(sent) / 4 == pytest.approx(expected)


@every_algorithm
def test_the_formula_and_the_function_of_a_card_agree(name: str) -> None:
    info = ALGORITHMS[name].info
    written = formula(info.uplink)
    if written is None:
        pytest.skip(f"{info.uplink!r} speaks of more than r, d and k")
    for r, d, k in ((4, 6, 8), (8, 384, 384), (3, 100, 7)):
        assert written(r, d, k) == pytest.approx(info.floats(r, d, k))


@every_algorithm
def test_a_card_names_the_parts_that_travel_and_no_others(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    parts = algorithm.family.parts(RANK, D_IN, D_OUT)
    travels = {spoken(name, part) for part in parts if algorithm.shares(f"layer.{part}")}
    named = {letter for part in parts if names(letter := spoken(name, part), algorithm.info.sends)}
    assert named - ALSO.get(name, set()) == travels


@every_algorithm
def test_what_travels_is_trained(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    for part in algorithm.family.parts(RANK, D_IN, D_OUT):
        if algorithm.shares(f"layer.{part}"):
            assert names(spoken(name, part), algorithm.info.trains)


@every_algorithm
def test_where_a_card_says_nothing_there_is_nothing(name: str) -> None:
    info = ALGORITHMS[name].info
    rounds, federation = ran(name)
    private = [federation.private(store) for store in federation.stores.values()]
    there = {
        "sends": any(payloads(name, "up")),
        "gets": any(payloads(name, "down")),
        "keeps": any(tensor.numel() for local in private for tensor in tensors_in(local)),
        "remembers": any(tensor.numel() for tensor in tensors_in(rounds[-1].server)),
    }
    for field, found in there.items():
        text = getattr(info, field)
        assert text
        if text in NOTHING:
            assert not found, f"{field}: {text!r}"
        elif field in ("sends", "gets"):
            assert found, f"{field}: {text!r}"


def test_every_exception_is_of_an_algorithm_that_there_is() -> None:
    assert {*OTHERWISE, *ALSO, *HEADS} <= set(ALGORITHMS)


def test_a_formula_is_read_as_it_is_written() -> None:
    for text, expected in (("r(d + k)/2", 28), ("4 r²", 64), ("r d", 24), ("r² + r", 20), ("2·r·k", 64), ("0", 0)):
        read = formula(text)
        assert read is not None and read(4, 6, 8) == expected
    assert formula("r d, r k in turns") is None
