"""Python source that is already on the machine: that of libraries which celora's own dependencies bring along.

Files are read, never imported, and nothing is downloaded. Public means that neither a function nor its class begins
with an underscore; its file may (scikit-learn and SciPy keep their public functions in such files). What was made of
the sources of some versions is kept, and the same versions give the same.
"""

import ast
import gc
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from celora.cache import cache_folder

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Columns = dict[str, list[str]]

LIBRARIES = {  # import name -> distribution: core dependencies of celora, or of these
    "torch": "torch", "transformers": "transformers", "sklearn": "scikit-learn", "scipy": "scipy",
    "numpy": "numpy", "matplotlib": "matplotlib", "networkx": "networkx", "sympy": "sympy",
    "huggingface_hub": "huggingface-hub", "pydantic": "pydantic", "rich": "rich", "fontTools": "fonttools",
}  # fmt: skip

_SKIPPED = {
    "tests", "_tests", "test", "testing", "benchmarks", "externals", "extern", "vendor", "_vendor",
}  # fmt: skip


def source_files(library: str) -> Iterator[tuple[str, Path]]:
    """(name within the library, path) of its source files but for tests, in an arbitrary but fixed order."""
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for file in sorted((file for file in files if not _is_test(file)), key=hashed):
        yield file, root / file


def _is_test(file: str) -> bool:
    parts = file.split("/")
    return bool(_SKIPPED.intersection(parts)) or parts[-1].startswith(("test_", "conftest"))


def documented(path: Path) -> Iterator[tuple[str, Definition, str]]:
    """(qualified name, definition, docstring) of every public function, class and method in a source file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes are not our user's business
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return  # templates, or written for another Python
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, parent = waiting.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.If | ast.Try):
                waiting.append((prefix, node))
            elif isinstance(node, Definition) and node.name[0] != "_":
                if docstring := ast.get_docstring(node):
                    yield prefix + node.name, node, docstring
                if isinstance(node, ast.ClassDef):
                    waiting.append((f"{prefix}{node.name}.", node))


def first_paragraph(docstring: str) -> str:
    """The first that is no box or directive, white space collapsed."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    first = next((one for one in paragraphs if not one.startswith(("!!!", "..", " "))), "")
    return " ".join(first.split())


def is_prose(text: str, least: int, most: int) -> bool:
    """Whether it has so many words and is ASCII, 85 % of it letters and spaces."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return least <= len(text.split()) <= most and text.isascii() and letters >= 0.85 * len(text)


def ends(text: str) -> set[str]:
    """The first and the last six words: near-copies ("Constructs a … tokenizer, based on …") differ at one end only."""
    words = text.lower().split()
    return {"^ " + " ".join(words[:6]), "$ " + " ".join(words[-6:])}


def hashed(text: str) -> str:
    """SHA-256 in hex; it puts files and texts in an order that favours none."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def kept(name: str, recipe: str, make: Callable[[], Columns]) -> Columns:
    """What `make` gives, from celora's cache if it was made before of these versions of the libraries.

    A damaged cache file is made anew, and a folder that cannot be written only costs the time again.

    Args:
        name: of the cache file.
        recipe: the source file of `make`; another one is another recipe.
    """
    cache = cache_folder() / f"{name}-{hashed(' '.join(_versions(recipe)))[:16]}.json"
    columns = _load(cache)
    if columns is None:
        with _no_garbage_collection():
            columns = make()
        _save(cache, columns)
    return columns


def _versions(recipe: str) -> Iterator[str]:
    yield f"python {sys.version_info[:2]}"
    for file in (__file__, recipe):
        yield hashed(Path(file).read_text("utf-8"))
    for distribution in LIBRARIES.values():
        with suppress(metadata.PackageNotFoundError):
            yield f"{distribution} {metadata.version(distribution)}"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees have no cycles: the collector walks over them in vain, half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _digest(columns: Mapping[str, object]) -> str:
    return hashed(json.dumps(columns, sort_keys=True))


def _load(cache: Path) -> Columns | None:
    """What is in the cache; None if there is nothing or it is not what was written."""
    try:
        content = json.loads(cache.read_text("utf-8"))
        digest, columns = content["digest"], content["columns"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return columns if digest == _digest(columns) else None


def _save(cache: Path, columns: Columns) -> None:
    """Written under a temporary name and renamed: another process never reads half a file."""
    with suppress(OSError):  # a read-only home is no reason to fail
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache.parent, suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"digest": _digest(columns), "columns": columns}, file)
            os.replace(temporary, cache)
        except OSError:
            os.unlink(temporary)
            raise
