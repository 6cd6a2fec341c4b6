"""`instructions`: real prompts and completions that are already on the machine. What does this function do?

The prompt is a function's name and parameters, as Python writes them; the completion is the first sentence of its
docstring. Six libraries, each with a subject and a manner of speaking of its own, all describe functions: as clients,
they have something to learn from each other, and something that is theirs. The same versions give the same rows in the
same order.
"""

import ast
import re
from dataclasses import dataclass

from celora.data import libraries
from celora.data.arrow import ArrowColumn
from celora.data.inputs import Records, record
from celora.data.table import Table, listing
from celora.errors import DataError

LIBRARIES = ("matplotlib", "networkx", "scipy", "sklearn", "sympy", "torch")
PER_LIBRARY = 400
LONGEST = 200
"""Characters of a prompt, at most: some 60 tokens."""

_SENTENCE = re.compile(r".+?(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)\.(?=\s|$)")


@dataclass(frozen=True)
class _Found:
    """A row: "networkx.classes.graph.Graph.add_node(node_for_adding, **attr)", "Add a single node …"."""

    prompt: str
    completion: str
    library: str
    origin: str
    """Where it was found: "networkx/classes/graph.py:Graph.add_node"."""


def read_instructions() -> Table:
    """400 rows for each library, sentences of 4 to 30 words, no two of which begin or end alike; a library is a client.

    Read from the cache if these versions were read before (`celora.data.libraries.kept`).

    Raises:
        DataError: if a library has fewer documented functions (e.g. its source files were compiled away).
    """
    columns = libraries.kept("instructions", __file__, _build)
    rows = zip(columns["prompt"], columns["completion"], strict=True)
    inputs = Records(ArrowColumn(record({"prompt": prompt, "completion": completion}) for prompt, completion in rows))
    return Table(inputs, columns["library"], columns["library"], None, columns["origin"])


def _build() -> libraries.Columns:
    """Parse some 1,100 source files: a few seconds."""
    seen: set[str] = set()
    rows: list[_Found] = []
    for library in LIBRARIES:
        found = _harvest(library, seen)
        if len(found) < PER_LIBRARY:
            raise DataError(
                f"'instructions' found {len(found)} documented functions in {library}, expected {PER_LIBRARY} in "
                f"each of {listing(LIBRARIES)}. Does this installation lack their .py files? Use files of your own."
            )
        rows += sorted(found, key=lambda row: libraries.hashed(row.prompt))[:PER_LIBRARY]
    rows.sort(key=lambda row: libraries.hashed(row.prompt))
    return {
        "prompt": [row.prompt for row in rows],
        "completion": [row.completion for row in rows],
        "library": [row.library for row in rows],
        "origin": [row.origin for row in rows],
    }


def _harvest(library: str, seen: set[str]) -> list[_Found]:
    """Rows of one library, until there are enough to choose."""
    found: list[_Found] = []
    for file, path in libraries.source_files(library):
        if any(part.startswith("_") for part in file.split("/")[:-1]):
            continue  # a private folder is not what a library offers
        for name, definition, docstring in libraries.documented(path):
            prompt, completion = _signature(library, file, name, definition), _first_sentence(docstring)
            marks = {prompt, *libraries.ends(completion)}
            if 0 < len(prompt) <= LONGEST and libraries.is_prose(completion, 4, 30) and not marks & seen:
                seen |= marks
                found.append(_Found(prompt, completion, library, f"{library}/{file}:{name}"))
        if len(found) >= 5 * PER_LIBRARY // 4:
            break
    return found


def _signature(library: str, file: str, name: str, definition: libraries.Definition) -> str:
    """Module (but for a private file's name), name, parameters and their defaults; "" where there are no parameters."""
    if isinstance(definition, ast.ClassDef):
        return ""
    given = definition.args
    for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
        if parameter is not None:
            parameter.annotation = None
    parameters = re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(given))
    module = [part for part in file.removesuffix(".py").split("/") if not part.startswith("_")]
    return f"{'.'.join([library, *module, name])}({parameters})" if parameters else ""


def _first_sentence(docstring: str) -> str:
    """With its full stop; "" if there is none."""
    found = _SENTENCE.match(libraries.first_paragraph(docstring))
    return "" if found is None else found[0]
