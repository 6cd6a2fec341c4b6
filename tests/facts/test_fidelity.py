"""docs/fidelity.md says of every algorithm where it comes from."""

from pathlib import Path

import pytest

from celora.algorithms import ALGORITHMS

TEXT = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_has_a_section_and_a_row(name: str) -> None:
    assert f"\n## {name}\n" in TEXT
    assert f"\n| `{name}` |" in TEXT
