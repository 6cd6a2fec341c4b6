"""`docstrings`: real texts that are already on the machine. Which library does this sentence describe?

The first paragraph of public docstrings of the libraries that `libraries` reads. The names of the libraries are masked,
repetitions are dropped, every library has the same number of texts. The same versions give the same texts in the same
order.
"""

import re
from dataclasses import dataclass

from celora.data import libraries
from celora.data.inputs import Texts
from celora.data.table import Table, listing
from celora.errors import DataError

PER_LIBRARY = 400
LEAST_LIBRARIES = 8
MASK = "[lib]"

_INSIDE = (  # these give the library away even within a word: "PyTorch", "numpy.ndarray"
    "torch|transformers|sklearn|scikit|scipy|numpy|matplotlib|pyplot|networkx|sympy|hugging[ _]?face|pydantic|fonttools"
)
_ALONE = r"np|plt|mpl|nx|rich|hf\w*"
_NAME = re.compile(rf"\b(?:\w*(?:{_INSIDE})[\w-]*|(?:{_ALONE}))\b(?:\.\w+)*", re.IGNORECASE)


@dataclass(frozen=True)
class _Found:
    text: str
    row: str


def read_docstrings() -> Table:
    """The embedded text set: 400 texts of 5 to 60 words for each library, label = the library's import name.

    Read from the cache if these versions were read before (`celora.data.libraries.kept`).

    Raises:
        DataError: if fewer than 8 of the libraries have enough documented source files (e.g. compiled away).
    """
    columns = libraries.kept("docstrings", __file__, _build)
    return Table(
        inputs=Texts(columns["inputs"]), labels=columns["labels"], groups=None, splits=None, rows=columns["rows"],
        notices=tuple(columns["notices"]),
    )  # fmt: skip


def _build() -> libraries.Columns:
    """Parse some 1,600 source files: about 5 seconds."""
    seen: set[str] = set()  # one for all libraries: a text that two of them share is a riddle without answer
    chosen: dict[str, list[_Found]] = {}
    short: list[str] = []
    for name in libraries.LIBRARIES:
        found = _harvest(name, seen)
        if len(found) < PER_LIBRARY:
            short.append(f"{name} ({len(found)})")
        else:
            chosen[name] = sorted(found, key=lambda one: libraries.hashed(one.text))[:PER_LIBRARY]
    if len(chosen) < LEAST_LIBRARIES:
        raise DataError(
            f"'docstrings' found only {len(chosen)} libraries with {PER_LIBRARY} documented functions "
            f"({listing(chosen) or 'none'}; too few: {', '.join(short)}), expected at least {LEAST_LIBRARIES}. "
            "Does this installation lack their .py files? Use your own files or 'digits' as the source."
        )
    rows = sorted(
        ((libraries.hashed(one.text), label, one) for label, many in chosen.items() for one in many),
        key=lambda row: row[0],
    )
    return {
        "inputs": [one.text for _, _, one in rows],
        "labels": [label for _, label, _ in rows],
        "rows": [one.row for _, _, one in rows],
        "notices": [f"docstrings: too few texts in {', '.join(short)}; left out as classes"] if short else [],
    }


def _harvest(name: str, seen: set[str]) -> list[_Found]:
    """Texts of one library, until there are enough to choose."""
    found: list[_Found] = []
    for file, path in libraries.source_files(name):
        for item, _, docstring in libraries.documented(path):
            text = _clean(docstring)
            if libraries.is_prose(text, 5, 60) and not libraries.ends(text) & seen:
                seen |= libraries.ends(text)
                found.append(_Found(text, f"{name}/{file}:{item}"))
        if len(found) >= 5 * PER_LIBRARY // 4:
            break
    return found


def _clean(docstring: str) -> str:
    """The first paragraph with all libraries' names masked."""
    return _NAME.sub(MASK, libraries.first_paragraph(docstring))
