"""Source files of installed libraries, and the instructions made of them."""

import os
from collections import Counter
from pathlib import Path

import pytest

from celora.data import instructions, libraries
from celora.data.inputs import Records
from celora.data.instructions import LIBRARIES, read_instructions
from celora.errors import DataError


@pytest.fixture
def explosive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library that must not be imported."""
    folder = tmp_path / "explosive"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_only_public_names_are_read_and_other_peoples_warnings_are_quiet(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(
        'def f():\n    "one \\d"\nclass C:\n    "two"\n    def m(self):\n        "three"\n'
        '    def _m(self): "no"\n'
        'class _P:\n    def m(self): "no"\nif True:\n    async def g(): "four"\n'
    )
    found = {name: docstring for name, _, docstring in libraries.documented(source)}
    assert found == {"f": "one \\d", "C": "two", "C.m": "three", "g": "four"}
    source.write_text("def {{ template }}")
    assert list(libraries.documented(source)) == []


def test_files_come_in_a_fixed_order_and_without_tests(explosive: Path) -> None:
    for name in ("b.py", "a.py", "tests/test_c.py", "d/_d.py", "conftest.py", "data.txt"):
        (explosive / name).parent.mkdir(exist_ok=True)
        (explosive / name).touch()
    files = [name for name, _ in libraries.source_files("explosive")]
    assert sorted(files) == ["__init__.py", "a.py", "b.py", "d/_d.py"]
    assert files == sorted(files, key=libraries.hashed)
    assert list(libraries.source_files("no_such_library")) == []


def test_what_was_made_is_made_anew_by_another_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = tmp_path / "recipe.py"
    recipe.write_text("one")
    assert libraries.kept("x", str(recipe), lambda: {"a": ["1"]}) == {"a": ["1"]}
    assert libraries.kept("x", str(recipe), lambda: {"a": ["2"]}) == {"a": ["1"]}
    recipe.write_text("two")
    assert libraries.kept("x", str(recipe), lambda: {"a": ["2"]}) == {"a": ["2"]}


def test_an_instruction_is_a_signature_and_the_first_sentence(explosive: Path) -> None:
    (explosive / "_private.py").write_text(
        "def join(a: list[int], *rest, sep: str = ',', **more) -> str:\n"
        '    """Join the parts of a name, e.g. two words, into one text.  With a separator.\n\n    More.\n    """\n'
        "class Pot:\n"
        '    """Holds what is cooked until it is served."""\n'
        "    def stir(self, /, times=3):\n"
        '        """Stir what is cooked\n        so many times.\n        """\n'
        "    def empty(self):\n"
        '        """Throw everything that it holds away."""\n'
        "    @classmethod\n"
        "    def of(cls, size, /):\n"
        '        """Buy a pot of this size."""\n'
    )
    (explosive / "_inside").mkdir()
    (explosive / "_inside" / "a.py").write_text('def secret(x):\n    """Do what nobody should see."""\n')
    (explosive / "sub.py").write_text('def bare(x):\n    """Sentence without a full stop"""\n')
    found = instructions._harvest("explosive", set())
    assert {row.prompt: row.completion for row in found} == {
        "explosive.join(a, *rest, sep=',', **more)": "Join the parts of a name, e.g. two words, into one text.",
        "explosive.Pot.stir(times=3)": "Stir what is cooked so many times.",
        "explosive.Pot.of(size, /)": "Buy a pot of this size.",
    }
    assert {row.library for row in found} == {"explosive"}
    assert "explosive/_private.py:Pot.stir" in {row.origin for row in found}


def test_of_two_functions_that_are_described_alike_the_first_is_read(explosive: Path) -> None:
    (explosive / "a.py").write_text(
        'def f(x):\n    """Return the mean of all values in the table."""\n'
        'def g(x):\n    """Return the mean of all values in the list."""\n'
        'def h(x):\n    """Give back the mean of all values in the table."""\n'
    )
    found = instructions._harvest("explosive", set())
    assert [row.prompt for row in found] == ["explosive.a.f(x)"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of our own, and 10 rows for each library."""
    monkeypatch.setattr(instructions, "PER_LIBRARY", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "celora"


def test_every_library_has_equally_many_distinct_rows(few: Path) -> None:
    rows = read_instructions()
    assert rows.groups is not None
    assert Counter(rows.groups) == dict.fromkeys(LIBRARIES, 10)
    assert isinstance(rows.inputs, Records)
    pairs = [(row["prompt"], row["completion"]) for row in rows.inputs]
    assert len({prompt for prompt, _ in pairs}) == len({completion for _, completion in pairs}) == len(rows)
    for library, (prompt, completion) in zip(rows.groups, pairs, strict=True):
        assert prompt.startswith(f"{library}.")
        assert completion.endswith(".")
        assert 4 <= len(completion.split()) <= 30


def test_the_same_versions_give_the_same_rows_with_and_without_the_cache(
    few: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = read_instructions().fingerprint()
    (file,) = few.iterdir()
    os.rename(file, tmp_path / "away")
    assert read_instructions().fingerprint() == rows
    monkeypatch.setattr(instructions, "_build", lambda: pytest.fail("the cache was not used"))
    assert read_instructions().fingerprint() == rows


def test_a_library_without_its_sources_is_an_error(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "LIBRARIES", ("no_such_library",))
    with pytest.raises(DataError, match=r"found 0 documented functions in no_such_library, expected 10"):
        read_instructions()


@pytest.mark.slow
def test_the_whole_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Counter(read_instructions().groups or []) == dict.fromkeys(LIBRARIES, 400)
