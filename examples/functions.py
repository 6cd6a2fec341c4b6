"""Real rows for multi-label.toml, regress.toml and tag.toml: python examples/functions.py FOLDER

They are made of the source files of libraries that are installed with celora, which are read and never imported:

functions.jsonl   text: a function's name and what it does; sections: of its documentation; parameters: how many it has
mentions.jsonl    tokens: a sentence of its documentation; tags: which words are its parameters, and which are constants
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celora.data import libraries

LIBRARIES = ("matplotlib", "networkx", "scipy", "sklearn", "sympy")
"""Those whose documentation has numpydoc's sections."""
PER_LIBRARY = 400
_WORD = re.compile(r"\w+(?:\.\w+)*|[^\w\s]")
_SENTENCE = re.compile(r"[A-Z][^.!?>]{20,200}\.(?=\s|$)")
_SECTION = re.compile(r"^(Parameters|Returns|Raises|Notes|References|Examples|See Also)\n[-=]{4,}$", re.MULTILINE)


def functions(library: str) -> Iterator[tuple[str, list[str], str]]:
    """Name, parameters and documentation of every public function."""
    for _, path in libraries.source_files(library):
        for name, definition, docstring in libraries.documented(path):
            if not isinstance(definition, ast.ClassDef):
                of = definition.args
                given = [one.arg for one in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
                yield name, [one for one in given if one not in ("self", "cls")], docstring


def described(library: str) -> Iterator[dict[str, Any]]:
    """A row for each function whose documentation has sections."""
    for name, parameters, docstring in functions(library):
        text, sections = libraries.first_paragraph(docstring), [one.lower() for one in _SECTION.findall(docstring)]
        if sections and libraries.is_prose(text, 4, 40):
            yield {"text": f"{name}: {text}", "sections": sections, "parameters": len(parameters), "library": library}


def mentions(library: str) -> Iterator[dict[str, Any]]:
    """A row for each sentence that names a parameter."""
    for _, parameters, docstring in functions(library):
        known = {name for name in parameters if len(name) > 1}
        for paragraph in re.split(r"\n\s*\n", docstring):
            for sentence in _SENTENCE.findall(" ".join(paragraph.split())):
                words = _WORD.findall(re.sub(r"[`*]", " ", sentence))
                tags = [_tag(word, known) for word in words]
                if "B-PARAMETER" in tags and 5 <= len(words) <= 30:
                    yield {"tokens": words, "tags": tags, "library": library}


def _tag(word: str, parameters: set[str]) -> str:
    if word in parameters:
        return "B-PARAMETER"
    return "B-CONSTANT" if word in ("None", "True", "False") else "O"


def main(folder: Path) -> None:
    """Write both files, with as many rows of each library, none of them twice."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows_of in (("functions", described), ("mentions", mentions)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for library in LIBRARIES:
                rows = dict.fromkeys(json.dumps(row) for row in rows_of(library))
                chosen = sorted(rows, key=libraries.hashed)[:PER_LIBRARY]
                file.writelines(f"{row}\n" for row in chosen)
                print(f"{name}.jsonl: {len(chosen)} rows of {library}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
