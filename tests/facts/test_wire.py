"""What a frame weighs, and that there is no pickle, as assertions about the source and about frames really built."""

import ast
import pickle
from pathlib import Path

import pytest
import torch

import celora
from celora.algorithms.ce_lora import Up
from celora.errors import WireError
from celora.tensors import nbytes
from celora.wire import Schema, pack, unpack

NAMES = [f"encoder.layer.{i}.attention.self.{m}.C" for i in range(6) for m in ("query", "key", "value", "output")]
CORES = {name: torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}
SOURCES = sorted(Path(celora.__path__[0]).rglob("*.py"))


def test_24_cores_of_8_by_8_weigh_at_most_2_percent_more_than_their_numbers() -> None:
    frame = pack(Up(CORES, 12_345, None), Schema.of({**CORES, "head.weight": torch.zeros(2, 384)}))
    assert nbytes(CORES) == 24 * 64 * 4 == 6144
    assert 6144 < len(frame) <= 1.02 * 6144


def test_names_do_not_travel_where_both_ends_know_them() -> None:
    known = pack(Up(CORES, 1, None), Schema.of(CORES))
    told = pack(Up(CORES, 1, None))
    assert b"encoder" not in known
    assert told.count(b"attention.self.query.C") == 6
    assert len(told) > len(known) + sum(map(len, NAMES))


def test_an_unknown_layout_costs_names_but_no_accuracy() -> None:
    other = Schema.of({name: torch.zeros(4, 4) for name in CORES})
    found = unpack(Up, pack(Up(CORES, 1, None), other), other).core
    assert all(torch.equal(found[name], CORES[name]) for name in CORES)


PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg"}


def imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


def weights_only(call: ast.Call) -> bool:
    """Whether a call of `torch.load` admits nothing but tensors."""
    return any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )


def unsafe(tree: ast.AST) -> list[str]:
    """Whatever runs or unpickles what it reads."""
    found = sorted(imports(tree) & PICKLERS)
    tensors_alone = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and weights_only(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            found += [name] if name in ("torch.load", "torch.save") and id(node) not in tensors_alone else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(node.func.id)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            safe = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if safe else ["allow_pickle"]
    return found


def test_loading_with_torch_counts_unless_it_admits_nothing_but_tensors() -> None:
    assert (
        unsafe(ast.parse("torch.load(f)")) == unsafe(ast.parse("torch.load(f, weights_only=False)")) == ["torch.load"]
    )
    assert not unsafe(ast.parse("torch.load(f, weights_only=True)"))


def test_no_module_pickles_or_runs_what_it_reads() -> None:
    assert len(SOURCES) > 20
    assert {path.name: found for path in SOURCES if (found := unsafe(ast.parse(path.read_text())))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(text)"],
)
def test_the_search_for_pickle_finds_it(source: str) -> None:
    assert unsafe(ast.parse(source))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_unopened(protocol: int) -> None:
    blob = pickle.dumps(Bomb(), protocol)
    with pytest.raises(WireError, match="not a celora frame"):
        unpack(Up, blob)
    with pytest.raises(WireError):
        unpack(Up, pack(Up({}, 1, None))[:-4] + blob)
