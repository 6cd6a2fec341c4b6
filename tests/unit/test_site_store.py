"""celora.site.store: whatever moment a process is killed at, each value on the store is whole."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.core.client import _base
from celora.core.client_state import ClientStore, KeptModel, Notes, StateKey, frame_of, unpacked
from celora.errors import FederationError, RunFolderError, WireError
from celora.site.store import SiteStore
from celora.wire import Schema

SCHEMA = Schema.of({"layer.A": torch.zeros(64)})
TURNS: list[dict[str, object]] = [
    {name: KeptModel({"layer.A": torch.full((64,), float(number))}) for name, number in turn.items()}
    for turn in (
        {"private@1": 1, "personal@1": 1},
        {"private@1": 1, "private@2": 2, "personal@1": 1, "received@1": 3, "personal@2": 2, "notes": 7},
        {"private@2": 2, "private@3": 3, "personal@1": 1, "personal@3": 3, "notes": 8},
        {"private@2": 2, "private@3": 4, "notes": 8},  # round 3 once more
    )
]


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site" / "north"


def numbers(store: Mapping[str, object]) -> dict[str, float]:
    return {name: float(unpacked(KeptModel, kept, SCHEMA).weights["layer.A"][0]) for name, kept in store.items()}


def kept(folder: Path) -> dict[str, float]:
    with SiteStore(folder, SCHEMA) as store:
        return numbers(store)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


def writes(monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], None]) -> Iterator[None]:
    """Call `happens` with 1, 2, … before each fsync, replace and unlink."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            happens(calls)
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def test_what_was_kept_is_there_in_the_next_process(folder: Path) -> None:
    with SiteStore(folder, SCHEMA) as store:
        assert (len(store), list(store)) == (0, [])
        for turn in TURNS:
            store.keep(turn)
            assert numbers(store) == numbers(turn)
    with SiteStore(folder, SCHEMA) as store:
        assert list(store) == ["notes", "private@2", "private@3"]
        assert (len(store), "notes" in store, "private@1" in store, 3 in store) == (3, True, False, False)
        assert store["private@3"] == frame_of(TURNS[-1]["private@3"], SCHEMA)
    assert files(folder) == {"notes.bin", "private@2.bin", "private@3.bin"}


def test_it_is_a_shelf(folder: Path) -> None:
    with SiteStore(folder, SCHEMA) as kept:
        store: ClientStore = kept
        store["notes"] = Notes(("one",))
        assert unpacked(Notes, store["notes"], SCHEMA).lines == ("one",)
        store["notes"] = Notes(("two",))
        assert unpacked(Notes, store["notes"], SCHEMA).lines == ("two",)
        assert store.get("private@1") is None
        del store["notes"]
        for act in (lambda: store["notes"], lambda: store.__delitem__("notes")):
            with pytest.raises(KeyError, match="notes"):
                act()


@pytest.mark.parametrize("first", range(len(TURNS) - 1))
def test_killed_before_any_write_each_value_is_the_old_or_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    before, after = numbers(TURNS[first]), numbers(TURNS[first + 1])
    moment, done = 0, False
    while not done:
        moment += 1
        with SiteStore(folder, SCHEMA) as store:
            store.keep(TURNS[first])

            def kill(call: int, moment: int = moment) -> None:
                if call == moment:
                    raise Killed

            for _ in writes(monkeypatch, kill):
                try:
                    store.keep(TURNS[first + 1])
                    done = True
                except Killed:
                    pass
        found = kept(folder)
        assert all(value in (before.get(name), after.get(name)) for name, value in found.items())
        everything_new = all(found.get(name) == value for name, value in after.items())
        assert everything_new or found.keys() >= before.keys()  # nothing goes before all that is new is there
        assert _base(dict.fromkeys(found), min(first + 2, 3)) == StateKey(
            "private", min(first + 1, 2)
        )  # nobody trains twice
        assert not [name for name in files(folder) if name.endswith(".tmp")]
    assert kept(folder) == after
    assert moment > 5


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_what_was_kept_is_intact(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def full(call: int) -> None:
        if call <= 1:
            raise OSError(error, os.strerror(error))

    with SiteStore(folder, SCHEMA) as store:
        store.keep(TURNS[2])
        for _ in writes(monkeypatch, full):
            with pytest.raises(RunFolderError) as told:
                store.keep(TURNS[3])
        assert str(told.value).startswith(
            f"cannot write {folder / 'private@3.bin'}: {os.strerror(error)}. Nothing written so far is lost; "
        )
        assert numbers(store) == numbers(TURNS[2])
        assert not [name for name in files(folder) if name.endswith(".tmp")]  # its room may be needed
        store.keep(TURNS[3])
        assert numbers(store) == numbers(TURNS[3])


def test_what_has_not_changed_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SiteStore(folder, SCHEMA) as store:
        store.keep(TURNS[1])
        moved = list[str]()
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
        store.keep(TURNS[1])
        store.keep(dict(store))  # frames, as they are read
        assert moved == []
        store.keep({**dict(store), "notes": TURNS[2]["notes"]})
        assert moved == ["notes.bin"]


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_only_the_owner_may_read_it_whatever_the_umask_and_whatever_it_was(folder: Path, umask: int) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    (folder / "private@1.bin").write_bytes(frame_of(TURNS[0]["private@1"], SCHEMA))
    (folder / "private@1.bin").chmod(0o666)
    (folder / "personal@1.bin.tmp").touch()
    (folder / "personal@1.bin.tmp").chmod(0o666)
    before = os.umask(umask)
    try:
        with SiteStore(folder, SCHEMA) as store:
            store.keep(TURNS[1])
            modes = {file.name: stat.S_IMODE(os.stat(file).st_mode) for file in folder.iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert set(modes.values()) == {0o600}
    assert set(modes) == {".lock", *(f"{name}.bin" for name in TURNS[1])}


def test_a_temporary_file_is_never_wider_than_its_owner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set[int]()

    def look(call: int) -> None:
        found.update(stat.S_IMODE(os.stat(file).st_mode) for file in folder.iterdir())

    before = os.umask(0)
    try:
        with SiteStore(folder, SCHEMA) as store:
            for _ in writes(monkeypatch, look):
                store.keep(TURNS[0])
    finally:
        os.umask(before)
    assert found == {0o600}


def test_a_new_folder_is_the_owners_alone_under_a_permissive_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        SiteStore(folder, SCHEMA).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_left_over_temporary_files_go_and_other_files_stay(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "private@1.bin.tmp").write_bytes(b"half")
    (folder / "readme.txt").write_text("ours")
    assert kept(folder) == {}
    assert files(folder) == {"readme.txt"}


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", ".lock", "x.bin.tmp", "", "Zürich", "a\0b", "a%2Fb"])
def test_no_name_leaves_the_folder(folder: Path, name: str) -> None:
    with SiteStore(folder, SCHEMA) as store:
        store[name] = b"frame"
        assert dict(store) == {name: b"frame"}
    assert len(files(folder)) == 1
    assert len(list(folder.parent.iterdir())) == 1
    with SiteStore(folder, SCHEMA) as store:
        assert dict(store) == {name: b"frame"}
        del store[name]
        assert dict(store) == {}


def test_two_at_once_are_refused_and_one_after_another_are_not(folder: Path) -> None:
    first = SiteStore(folder, SCHEMA)
    with pytest.raises(FederationError) as refused:
        SiteStore(folder, SCHEMA)
    assert str(refused.value) == (
        f"{folder} is in use by another process of this site: wait for it, or end it; two clients need two folders"
    )
    first.close()
    with SiteStore(folder, SCHEMA), pytest.raises(FederationError):
        SiteStore(folder, SCHEMA)
    SiteStore(folder, SCHEMA).close()


def test_a_folder_in_use_is_left_as_it_is_by_who_is_refused(folder: Path) -> None:
    with SiteStore(folder, SCHEMA):
        (folder / "private@1.bin.tmp").write_bytes(b"being written")
        with pytest.raises(FederationError):
            SiteStore(folder, SCHEMA)
        assert files(folder) == {"private@1.bin.tmp"}


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "north").touch()
    with pytest.raises(RunFolderError, match=r"cannot write .*north: File exists"):
        SiteStore(tmp_path / "north", SCHEMA)


def test_a_value_that_cannot_be_read_is_told(folder: Path) -> None:
    with SiteStore(folder, SCHEMA) as store:
        (folder / "notes.bin").mkdir()
        with pytest.raises(WireError) as told:
            store["notes"]
    assert str(told.value) == f"{folder / 'notes.bin'} cannot be read: Is a directory; check who owns it"
