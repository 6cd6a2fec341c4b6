"""celora.algorithms.lookup: one function from a name to an algorithm, whoever has written it."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from celora import catalog
from celora.algorithms import ALGORITHMS, lookup
from celora.algorithms.fedit import FedIT
from celora.errors import ConfigError, PolicyError
from celora.experiment.client import SiteData, local
from celora.experiment.config import dump, resolve
from celora.site.policy import NO_FILE, Policy, read_policy
from tests.own_words import OwnWords

NAME = "tests.own_words:OwnWords"


class Package:
    """An installed package, as far as `lookup` looks at one."""

    name = "my-package"


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """What installed packages offer."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(lookup, "_offered", lambda: tuple(points))
    return points


def point(name: str, value: str = NAME) -> EntryPoint:
    found = EntryPoint(name, value, lookup.GROUP)
    vars(found).update(dist=Package())  # as importlib.metadata does
    return found


def problem(name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        lookup.lookup(name)
    (found,) = refused.value.problems
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_name_of_the_table_is_its_algorithm(name: str) -> None:
    assert lookup.lookup(name) is ALGORITHMS[name]
    assert lookup.package(name) is None


def test_a_class_is_named_by_its_module() -> None:
    assert lookup.lookup("celora.algorithms.fedit:FedIT") is FedIT
    assert lookup.lookup(NAME) is OwnWords


def test_an_entry_point_gives_a_class_a_short_name(offered: list[EntryPoint]) -> None:
    offered.append(point("own-words"))
    assert lookup.lookup("own-words") is OwnWords
    assert lookup.known() == (*ALGORITHMS, "own-words")
    assert lookup.package("own-words") == "my-package"


def test_an_unknown_name_is_told_the_known_ones(offered: list[EntryPoint]) -> None:
    offered.append(point("own-words"))
    assert problem("own-wrods").startswith("found 'own-wrods', expected one of 'local', 'fedit',")
    assert problem("own-wrods").endswith("'pf2lora', 'own-words' or 'package.module:Class'. Did you mean 'own-words'?")


def test_a_name_that_two_have_is_nobodys(offered: list[EntryPoint]) -> None:
    """Else a package could put its own code in the place of a known method, or be taken for one."""
    offered.append(point("fedit"))
    assert problem("fedit") == (
        "found 'fedit', a name that celora itself and the package my-package (tests.own_words:OwnWords) have; ask for "
        "the class, such as 'tests.own_words:OwnWords'"
    )
    offered.extend([point("mine"), point("mine", "other:Mine")])
    assert "the package my-package (tests.own_words:OwnWords) and the package my-package (other:Mine)" in problem(
        "mine"
    )


BROKEN = """
from celora.algorithms.fedit import FedIT
from celora.core.algorithm import Algorithm, AlgorithmInfo
from celora.fields import settings

class Half:
    info = FedIT.info

    def server_init(self): ...

@settings
class Abstract(Algorithm[int, int, int, int]):
    info = FedIT.info

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_cannot_be_imported_is_told_why(module: Any) -> None:
    assert problem("nowhere.method:Mine") == (
        "found 'nowhere.method:Mine', but the module nowhere.method cannot be imported (ModuleNotFoundError: No module "
        "named 'nowhere'); install its package, or mend it"
    )
    module("divides", "1 / 0")
    assert "the module divides cannot be imported (ZeroDivisionError: division by zero)" in problem("divides:Mine")
    assert problem("../fedit:FedIT") == "found '../fedit:FedIT', expected 'package.module:Class'"


def test_a_card_without_records_is_told_how_to_name_them(module: Any) -> None:
    module(
        "bare",
        "from celora.algorithms.fedit import FedIT\nimport dataclasses\nclass Bare:\n    info = "
        "dataclasses.replace(FedIT.info)\n",
    )
    assert "(TypeError: expected class Bare(Algorithm[Server, Local, Down, Up]))" in problem("bare:Bare")


def test_what_is_no_algorithm_is_told_what_it_lacks(module: Any, offered: list[EntryPoint]) -> None:
    module("broken", BROKEN)
    assert problem("broken:Hlaf") == "found 'broken:Hlaf', but broken has no class Hlaf. Did you mean 'Half'?"
    assert problem("broken:number") == "found 'broken:number', but broken has no class number"
    assert problem("broken:Half") == (
        "found 'broken:Half', which is no algorithm: Half lacks family, head, shares, client_init, send, train, "
        "aggregate, model, conflicts; expected class Half(Algorithm[Server, Local, Down, Up]), see "
        "celora.core.algorithm"
    )
    assert "Abstract lacks family, head, shares, server_init, client_init, send, train, aggregate, model; " in problem(
        "broken:Abstract"
    )
    offered.append(point("half", "broken:Half"))
    assert problem("half").startswith(
        "found 'half' of the package my-package, which is no algorithm: Half lacks family"
    )


# --- who uses it


def test_a_configuration_names_a_class_and_keeps_its_name(offered: list[EntryPoint]) -> None:
    offered.append(point("own-words"))
    for name in (NAME, "own-words"):
        found = resolve({"algorithm": {"name": name, "fewest": 12}}, Path())
        assert found.algorithm == OwnWords(fewest=12)
        assert found.settings()["algorithm"]["name"] == name
    with pytest.raises(ConfigError, match=r"algorithm\.name: found 'nowhere:Mine', but the module nowhere cannot be"):
        resolve({"algorithm": {"name": "nowhere:Mine"}}, Path())


def test_an_override_may_be_meant_by_a_name(offered: list[EntryPoint]) -> None:
    with pytest.raises(ConfigError, match=r"'wide' or 'package\.module:Class'\. Did you mean 'wide'\?"):
        resolve({"algorithm": {"name": "wied"}, "overrides": {"wide": {"adapter": {"rank": 3}}}}, Path())


def test_the_list_shows_what_packages_offer_and_of_which_package(offered: list[EntryPoint]) -> None:
    offered.append(point("own-words"))
    *table, mine = catalog.describe([])
    assert [entry["name"] for entry in table] == list(ALGORITHMS)
    assert (mine["name"], mine["package"], mine["data_summary"], mine["mixing_matrix"]) == (
        "own-words", "my-package", True, True,
    )  # fmt: skip
    assert {entry["package"] for entry in table} == {None}
    assert catalog.describe([NAME])[0]["package"] is None


# --- sites


def asked(name: str) -> str:
    """A server's experiment that names an algorithm."""
    known = dump(resolve({"data": {"source": "a.csv"}, "algorithm": {"name": "fedit"}}, Path()))
    return known.replace('name = "fedit"', f'name = "{name}"')


def test_a_site_imports_nothing_that_a_server_names(module: Any, tmp_path: Path) -> None:
    module("evil", f"import pathlib\npathlib.Path({str(tmp_path / 'was_here')!r}).touch()")
    for policy in (NO_FILE, Policy(allow=("fedit",)), Policy(allow=())):
        with pytest.raises(PolicyError, match=r"found algorithm\.name = 'evil:Evil', expected"):
            local(asked("evil:Evil"), SiteData(tmp_path), policy)
    assert not (tmp_path / "was_here").exists()
    with pytest.raises(ConfigError, match="evil has no class Evil"):
        local(asked("evil:Evil"), SiteData(tmp_path), Policy(allow=("evil:Evil",)))
    assert (tmp_path / "was_here").exists()


def test_a_site_runs_what_its_policy_lists_and_nothing_else(tmp_path: Path) -> None:
    assert local(asked("fedit"), SiteData(tmp_path)).algorithm == FedIT()
    assert local(asked("fedit"), SiteData(tmp_path), Policy(allow=("fedit",))).algorithm == FedIT()
    with pytest.raises(PolicyError) as refused:
        local(asked("fedit"), SiteData(tmp_path), Policy(allow=("ce-lora", NAME)))
    assert str(refused.value) == (
        "this site does not take part: found algorithm.name = 'fedit', expected ce-lora, tests.own_words:OwnWords; "
        "choose another algorithm, or change the policy at the site ([algorithms] allow)"
    )


def test_without_a_list_a_site_runs_the_table_only() -> None:
    for name in ALGORITHMS:
        NO_FILE.permit(name)
    with pytest.raises(
        PolicyError, match=r"found algorithm\.name = 'tests.own_words:OwnWords', expected an algorithm of"
    ):
        NO_FILE.permit(NAME)


def policy(folder: Path, text: str) -> Policy:
    (folder / "policy.toml").write_text(f"version = 1\n{text}")
    return read_policy(folder / "policy.toml")


def test_what_a_listed_algorithm_sends_can_be_named_in_a_policy(tmp_path: Path) -> None:
    text = f'[algorithms]\nallow = ["{NAME}"]\n[leaves]\n"own_words.Up" = ["weights", "n"]'
    found = policy(tmp_path, text)
    assert (found.allow, found.leaves) == ((NAME,), {"own_words.Up": ("weights", "n")})
    assert f"algorithms: {NAME}" in found.describe()
    with pytest.raises(ConfigError, match=r"leaves\.own_words\.Up: unknown record"):
        policy(tmp_path, '[leaves]\n"own_words.Up" = ["weights", "n"]')


def test_a_policy_that_lists_what_there_is_not_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        policy(tmp_path, '[algorithms]\nallow = ["fedti", "nowhere:Mine"]')
    first, second = refused.value.problems
    assert first.startswith("policy.toml: algorithms.allow: found 'fedti', expected one of")
    assert second.startswith("policy.toml: algorithms.allow: found 'nowhere:Mine', but the module nowhere cannot be")
