"""What celora imports of flwr: its public API, and in one file what lies beneath it."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import celora

SOURCE = Path(celora.__file__).parent
INTERNALS = SOURCE / "engines" / "flower_internals.py"
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation", "flwr.common")
"""The modules that flwr documents as its API, with all names of their `__all__`."""


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module of flwr that a file imports, at its top or in a function, and the names that it takes from there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "flwr")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            yield str(node.module), [alias.name for alias in node.names]


def beneath(path: Path) -> list[str]:
    """What a file imports of flwr that is not in its public API."""
    pytest.importorskip("flwr")
    found = []
    for module, names in imports(path):
        public = import_module(module).__all__ if module in PUBLIC else []
        found += [f"{module}.{name}" for name in names if name not in public] if names else [module]
    return found


def test_only_one_file_imports_what_lies_beneath_flwrs_public_api() -> None:
    found = {path for path in SOURCE.rglob("*.py") if beneath(path)}
    assert found == {INTERNALS}


def test_a_public_module_does_not_make_all_its_names_public(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "from flwr.app import Message, message\nfrom flwr.common.constant import Status\n"
        "def f():\n    import flwr.supercore\n"
    )
    assert beneath(path) == ["flwr.app.message", "flwr.common.constant.Status", "flwr.supercore"]


def test_each_import_of_internals_has_its_reason_beside_it() -> None:
    lines, tree = INTERNALS.read_text().splitlines(), ast.parse(INTERNALS.read_text())
    starts = [
        n.lineno - 1 for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("flwr")
    ]
    without = [lines[at] for at in starts if "  # " not in lines[at] and not lines[at - 1].strip().startswith("#")]
    assert len(starts) > 10 and without == []
