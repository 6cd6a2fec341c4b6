"""celora.marks: what an algorithm calls its fields is its own business."""

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import celora
from celora.algorithms import ALGORITHMS, ce_lora, fed_sb, fedmosaic
from celora.core.messages import Exchange, Plan
from celora.core.screen import screen
from celora.errors import ConfigError, PolicyError
from celora.experiment.client import SiteData, local
from celora.experiment.config import dump, resolve
from celora.marks import Bounded, DataSummary, MixingMatrix, RowCount, Summary, marked, marked_values
from celora.site.policy import Policy
from celora.tensors import Tensors
from celora.track.folder import RunFolder
from celora.wire import NOTHING, Schema, pack, record, unpack
from celora.wire.records import fingerprint
from tests.own_words import OwnWords, Up
from tests.toy import CLIENTS, D_OUT, Federation

NAME = "tests.own_words:OwnWords"


@record
class Counted:
    n: RowCount
    told: Summary[Tensor | None] = None


@record
class Nested:
    first: Counted
    many: tuple[Counted, ...]
    of: Mapping[str, Counted]
    maybe: RowCount | None = None


# --- marks


def test_a_mark_is_found_in_an_annotation_whatever_stands_around_it() -> None:
    assert marked(Counted, Bounded) == {"n": Bounded(1, 10**9)}
    assert list(marked(Counted, DataSummary)) == ["told"]
    assert list(marked(Nested, Bounded)) == ["maybe"]
    assert marked(Counted, MixingMatrix) == {}


def test_a_mark_is_found_in_records_inside_records() -> None:
    value = Nested(Counted(1), (Counted(2),), {"a": Counted(3)}, 4)
    found = {path: number for path, number, _ in marked_values(value, Bounded)}
    assert found == {("first", "n"): 1, ("many", "0", "n"): 2, ("of", "a", "n"): 3, ("maybe",): 4}


@pytest.mark.parametrize("wrong", ["first.n", "many.0.n", "of.a.n", "maybe"])
def test_a_count_out_of_bounds_is_refused_wherever_it_is(wrong: str) -> None:
    n = {name: 0 if name == wrong else 5 for name in ("first.n", "many.0.n", "of.a.n", "maybe")}
    up = Nested(Counted(n["first.n"]), (Counted(n["many.0.n"]),), {"a": Counted(n["of.a.n"])}, n["maybe"])
    assert screen(up, NOTHING, lambda name: True) == f"{wrong}: found 0, expected 1 to 1000000000"


def test_a_count_that_is_left_out_is_within_its_bounds() -> None:
    assert screen(Nested(Counted(5), (), {}, None), NOTHING, lambda name: True) is None


def with_marks() -> type:
    @record
    class Told:
        core: Annotated[Tensors, "anything"]
        n: RowCount
        sketch: Summary[Tensor | None]

    return Told


def without_marks() -> type:
    @record
    class Told:
        core: Tensors
        n: int
        sketch: Tensor | None

    return Told


def test_marks_change_neither_the_layout_nor_a_byte_of_a_frame() -> None:
    marks, plain = with_marks(), without_marks()
    schema = Schema.of({"q.C": torch.eye(2)})
    assert fingerprint(marks, schema) == fingerprint(plain, schema)
    values = {"q.C": torch.eye(2)}, 7, torch.ones(3)
    assert pack(marks(*values), schema) == pack(plain(*values), schema)
    assert unpack(marks, pack(plain(*values), schema), schema).n == 7


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ce_lora.Up, "17dc93ca01856b40"),
        (ce_lora.Server, "831c5cc0ebc89c2d"),
        (fedmosaic.Up, "7d00b5796a5ffcfe"),
        (fed_sb.Up, "a7c1f63886c3727d"),
    ],
    ids=["ce-lora up", "ce-lora server", "fedmosaic up", "fed-sb up"],
)
def test_frames_written_before_there_were_marks_are_read(kind: type, expected: str) -> None:
    assert fingerprint(kind, NOTHING).hex() == expected


# --- an algorithm in its own words


def sending(**changes: Any) -> Any:
    """An exchange on which c0 sends other values than it should."""

    def around(exchange: Exchange) -> Exchange:
        def changed(instructions: Any) -> Any:
            replies = dict(exchange(instructions))
            if replies["c0"].frame:
                schema = Federation(OwnWords()).schema
                up = dataclasses.replace(unpack(Up, replies["c0"].frame, schema), **changes)
                replies["c0"] = dataclasses.replace(replies["c0"], frame=pack(up, schema))
            return replies

        return changed

    return around


@pytest.mark.parametrize("n", [0, -3, 10**9 + 1])
def test_its_count_is_screened(n: int) -> None:
    first = next(Federation(OwnWords()).run(Plan(rounds=1), sending(n=n)))
    assert first.excluded == {"c0": f"n: found {n}, expected 1 to 1000000000"}
    assert first.heard == CLIENTS[1:]


def test_its_summary_is_counted_apart_from_the_adapter() -> None:
    traffic = next(Federation(OwnWords()).run(Plan(rounds=1))).traffic["c0"]
    assert traffic.summary == D_OUT * 4
    assert traffic.up_payload == (4 * 6 + 8 * 4) * 4


def test_who_learned_from_whom_is_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    rounds = list(Federation(OwnWords()).run(Plan(rounds=1)))
    folder.mixing(rounds[0].server, 1)
    assert np.load(tmp_path / "run" / "similarity" / "round_0001.npy").tolist() == [[0.25] * 4] * 4
    assert folder.read_json("similarity/clients.json") == list(CLIENTS)


def test_a_site_refuses_a_floor_below_its_own() -> None:
    Policy(floor=10).accept(OwnWords(fewest=10), 100)
    with pytest.raises(PolicyError, match=r"found algorithm\.fewest = 9, expected at least 10, .*; raise fewest in"):
        Policy(floor=10).accept(OwnWords(fewest=9), 100)


def test_a_site_fills_in_its_own_secret(tmp_path: Path) -> None:
    tree = {"data": {"source": "a.csv"}, "algorithm": {"name": NAME, "pad": "/dev/zero"}}
    asked, policy = dump(resolve(tree, Path())), Policy(allow=(NAME,))
    with pytest.raises(ConfigError, match=r"--secret: tests\.own_words:OwnWords encrypts"):
        local(asked, SiteData(tmp_path), policy)
    chosen: Any = local(asked, SiteData(tmp_path, secret=tmp_path / "pad"), policy).algorithm
    assert chosen.pad == str(tmp_path / "pad")


def test_it_states_its_own_conflicts() -> None:
    tree = {"adapter": {"rank": 2}, "algorithm": {"name": NAME, "wide": True}}
    with pytest.raises(ConfigError, match=r"algorithm\.wide: found adapter\.rank = 2, expected at least 3"):
        resolve(tree, Path())
    resolve({**tree, "adapter": {"rank": 3}}, Path())


def test_its_card_says_what_its_annotations_say() -> None:
    info = OwnWords.info
    assert (info.up, info.data_summary, info.mixing_matrix) == (Up, True, True)
    fedit = ALGORITHMS["fedit"].info
    assert (fedit.data_summary, fedit.mixing_matrix) == (False, False)


# --- the source

SOURCE = Path(celora.__path__[0])
ELSEWHERE = [path for path in SOURCE.rglob("*.py") if "algorithms" not in path.parts]


@cache
def own_names() -> frozenset[str]:
    """What algorithms call their settings and the fields of their records."""
    kinds = [k for a in ALGORITHMS.values() for k in (a, a.info.server, a.info.local, a.info.down, a.info.up)]
    return frozenset(field.name for kind in kinds for field in dataclasses.fields(kind))


def by_name(tree: ast.AST) -> Iterator[str]:
    """Names of fields of algorithms that are looked for, and texts that begin like the name of a head's tensor."""
    for node in ast.walk(tree):
        texts = [part.value for part in ast.iter_child_nodes(node) if isinstance(part, ast.Constant)]
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
        compares = isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Attribute) and part.attr == "name" for part in ast.walk(node)
        )
        yield from own_names().intersection(texts) if asks or compares else ()
        yield from (text for text in texts if isinstance(text, str) and text.startswith("head."))


@pytest.mark.parametrize(
    "source",
    [
        'getattr(algorithm, "freeze_bases", False)',
        'field.name == "examples"',
        '"key" in {field.name for field in fields(kind)}',
        'name.startswith("head.")',
    ],
)
def test_the_search_for_names_finds_them(source: str) -> None:
    assert list(by_name(ast.parse(source)))


def test_nobody_but_an_algorithm_knows_what_it_calls_its_fields() -> None:
    assert len(ELSEWHERE) > 80
    models = [path for room in ("models", "tasks") for path in (SOURCE / room).rglob("*.py")]
    knows_heads = {SOURCE / "tensors.py", SOURCE / "testing" / "population.py", *models}
    trees = {path: ast.parse(path.read_text()) for path in ELSEWHERE if path not in knows_heads}
    assert {path.name: found for path, tree in trees.items() if (found := list(by_name(tree)))} == {}
