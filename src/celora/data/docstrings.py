"""`docstrings`: real texts that are already on the machine. Which library does this sentence describe?

The first paragraph of public docstrings, read from the *source files* of packages that celora's own
dependencies bring along: nothing is downloaded and nothing is imported. Public means that neither the
function nor its class begins with an underscore; its file may (scikit-learn and SciPy keep their public
functions in such files). The names of the libraries are masked, repetitions are dropped, every library has
the same number of texts. The same versions give the same texts in the same order.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from celora.data.inputs import Texts
from celora.data.table import Table, listing
from celora.errors import DataError

LIBRARIES = {  # import name -> distribution: core dependencies of celora, or of these
    "torch": "torch", "transformers": "transformers", "sklearn": "scikit-learn", "scipy": "scipy",
    "numpy": "numpy", "matplotlib": "matplotlib", "networkx": "networkx", "sympy": "sympy",
    "huggingface_hub": "huggingface-hub", "pydantic": "pydantic", "rich": "rich", "fontTools": "fonttools",
}  # fmt: skip
PER_LIBRARY = 400
LEAST_LIBRARIES = 8
MASK = "[lib]"

_INSIDE = (  # these give the library away even within a word: "PyTorch", "numpy.ndarray"
    "torch|transformers|sklearn|scikit|scipy|numpy|matplotlib|pyplot|networkx|sympy|hugging[ _]?face|pydantic|fonttools"
)
_ALONE = r"np|plt|mpl|nx|rich|hf\w*"
_NAME = re.compile(rf"\b(?:\w*(?:{_INSIDE})[\w-]*|(?:{_ALONE}))\b(?:\.\w+)*", re.IGNORECASE)
_SKIPPED = {
    "tests", "_tests", "test", "testing", "benchmarks", "externals", "extern", "vendor", "_vendor",
}  # fmt: skip


@dataclass(frozen=True)
class _Found:
    text: str
    row: str


def read_docstrings() -> Table:
    """The embedded text set: 400 texts of 5 to 60 words for each library, label = the library's import name.

    Read from the cache (`$XDG_CACHE_HOME` or `~/.cache`, folder `celora`) if these versions were read before;
    a damaged cache file is made anew, and a folder that cannot be written only costs the seconds again.

    Raises:
        DataError: if fewer than 8 of the libraries have enough documented source files (e.g. compiled away).
    """
    cache = _cache_file()
    table = _load(cache)
    if table is None:
        with _no_garbage_collection():
            table = _build()
        _save(cache, table)
    return table


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees have no cycles: the collector walks over them in vain, half of the time of `_build`."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _build() -> Table:
    """Parse some 1,600 source files: about 5 seconds."""
    seen: set[str] = set()  # one for all libraries: a text that two of them share is a riddle without answer
    kept: dict[str, list[_Found]] = {}
    short: list[str] = []
    for name in LIBRARIES:
        found = _harvest(name, seen)
        if len(found) < PER_LIBRARY:
            short.append(f"{name} ({len(found)})")
        else:
            kept[name] = sorted(found, key=lambda one: _hash(one.text))[:PER_LIBRARY]
    if len(kept) < LEAST_LIBRARIES:
        raise DataError(
            f"'docstrings' found only {len(kept)} libraries with {PER_LIBRARY} documented functions "
            f"({listing(kept) or 'none'}; too few: {', '.join(short)}), expected at least {LEAST_LIBRARIES}. "
            "Does this installation lack their .py files? Use your own files or 'digits' as the source."
        )
    notices = () if not short else (f"docstrings: too few texts in {', '.join(short)}; left out as classes",)
    rows = sorted(
        ((_hash(one.text), label, one) for label, many in kept.items() for one in many),
        key=lambda row: row[0],
    )
    return Table(
        inputs=Texts(one.text for _, _, one in rows), labels=[label for _, label, _ in rows], groups=None,
        splits=None, rows=[one.row for _, _, one in rows], notices=notices,
    )  # fmt: skip


def _harvest(name: str, seen: set[str]) -> list[_Found]:
    """Texts of one library, from files in an arbitrary but fixed order, until there are enough to choose."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    found: list[_Found] = []
    for file in sorted((file for file in files if not _is_test(file)), key=_hash):
        for item, docstring in _documented(root / file):
            text = _clean(docstring)
            words = text.lower().split()
            # Families of near-copies ("Constructs a … tokenizer, based on …") differ at one end only.
            ends = {"^ " + " ".join(words[:6]), "$ " + " ".join(words[-6:])}
            if _is_prose(text) and not ends & seen:
                seen |= ends
                found.append(_Found(text, f"{name}/{file}:{item}"))
        if len(found) >= 5 * PER_LIBRARY // 4:
            break
    return found


def _is_test(file: str) -> bool:
    parts = file.split("/")
    return bool(_SKIPPED.intersection(parts)) or parts[-1].startswith(("test_", "conftest"))


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of every public function, class and method in a source file."""
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
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                if docstring := ast.get_docstring(node):
                    yield prefix + node.name, docstring
                if isinstance(node, ast.ClassDef):
                    waiting.append((f"{prefix}{node.name}.", node))


def _clean(docstring: str) -> str:
    """First paragraph that is no box or directive, white space collapsed, all libraries' names masked."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    first = next((one for one in paragraphs if not one.startswith(("!!!", "..", " "))), "")
    return _NAME.sub(MASK, " ".join(first.split()))


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    return 5 <= len(text.split()) <= 60 and text.isascii() and letters >= 0.85 * len(text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _cache_file() -> Path:
    """One file for each set of versions and each version of this recipe (this very file)."""
    versions = [f"python {sys.version_info[:2]}", _hash(Path(__file__).read_text("utf-8"))]
    for distribution in LIBRARIES.values():
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{distribution} {metadata.version(distribution)}")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "celora" / f"docstrings-{_hash(' '.join(versions))[:16]}.json"


def _load(cache: Path) -> Table | None:
    """The cached table; None if there is none or it is not what was written."""
    try:
        content = json.loads(cache.read_text("utf-8"))
        table = Table(
            Texts(content["inputs"]), content["labels"], None, None, content["rows"], tuple(content["notices"])
        )
        return table if table.fingerprint() == content["fingerprint"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _save(cache: Path, table: Table) -> None:
    """Written under a temporary name and renamed: another process never reads half a file."""
    texts = [table.inputs[row] for row in range(len(table))]
    content = {"inputs": texts, "labels": table.labels, "rows": table.rows, "notices": table.notices}
    with suppress(OSError):  # a read-only home is no reason to fail
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache.parent, suffix=".tmp")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({**content, "fingerprint": table.fingerprint()}, file)
            os.replace(temporary, cache)
        except OSError:
            os.unlink(temporary)
            raise
