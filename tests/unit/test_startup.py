"""What a command imports, and what it does not: torch alone takes a second."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "numpy", "scipy", "sklearn", "ot", "pandas", "pyarrow", "PIL", "matplotlib", "transformers", "peft",
    "flwr", "ray",
}  # fmt: skip
RUN = """
import json, sys
from celora.cli import main
try:
    main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def imported(*words: str, code: int = 0, **environment: str) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    names: list[str] = json.loads(ended.stderr.splitlines()[-1])
    return set(names)


@pytest.mark.parametrize(
    "words", [("--version",), ("--help",), ("run", "--help"), ("export", "--help"), ("site", "ledger", "--help")]
)
def test_version_and_help_import_neither_pydantic_nor_anything_heavier(words: tuple[str, ...]) -> None:
    assert not imported(*words) & {*HEAVY, "pydantic"}


def test_completion_imports_neither_pydantic_nor_anything_heavier() -> None:
    found = imported(_CELORA_COMPLETE="complete_bash", COMP_WORDS="celora ru", COMP_CWORD="1")
    assert not found & {*HEAVY, "pydantic"}


def test_keys_are_made_without_torch(tmp_path: Path) -> None:
    assert not imported("keys", "dev", "--out", str(tmp_path / "keys"), "--sites", "a,b") & HEAVY


@pytest.mark.parametrize("words", [("list",), ("list", "ce-lora"), ("list", "--json")])
def test_algorithms_are_listed_without_torch(words: tuple[str, ...]) -> None:
    assert not imported(*words) & HEAVY


@pytest.mark.parametrize(
    "words",
    [
        ("run", "CONFIG", "--set", "adapter.rnak=4"),
        ("run", "CONFIG", "--set", "adapter.ranks=[2, 4]", "--set", "algorithm.name=fedit"),
        ("run", "CONFIG", "--engine", "flower-sin"),
        ("compare", "CONFIG", "--algorithms", "fedti,ce-lora"),
        ("compare", "CONFIG", "--algorithms", "fedit,ce-lora", "--match", "bytes"),
    ],
)
def test_a_mistake_in_a_configuration_is_told_without_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[plan]\nrounds = 1\n")
    assert not imported(*(str(config) if word == "CONFIG" else word for word in words), code=2) & HEAVY


def test_the_ledger_is_shown_without_torch(tmp_path: Path) -> None:
    assert not imported("site", "ledger", "--state", str(tmp_path), code=2) & HEAVY


def test_the_package_and_its_algorithms_are_imported_without_torch() -> None:
    code = "import sys, celora; celora.ALGORITHMS, celora.Fit, celora.Recipe, celora.read; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ended.stdout.split()) & HEAVY
