"""celora.track.client_stores and the checkpoints made of them: what lies on disk and what does not, nobody can tell."""

import errno
import gc
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.algorithms.fedsa_lora import Local
from celora.core.client_state import ClientStore, KeptModel, frame_of, unpacked
from celora.core.messages import Checkpoint
from celora.errors import RunFolderError, WireError
from celora.track import client_stores as module
from celora.track.client_stores import ClientStores
from celora.track.folder import RunFolder
from celora.wire import Schema
from tests.toy import image

SCHEMA = Schema.of({"layer.A": torch.zeros(64)})
SIZE = 256  # bytes of tensors on each of the stores below


def store(number: float, round: int = 1) -> ClientStore:
    return {f"private@{round}": Local({"layer.A": torch.full((64,), float(number))})}


def number_on(kept: ClientStore) -> float:
    """What `store` was made of, whether it comes from memory or from disk."""
    (value,) = kept.values()
    return float(unpacked(Local, value, SCHEMA).mine["layer.A"][0])


def is_live(kept: ClientStore) -> bool:
    return not any(isinstance(value, bytes) for value in kept.values())


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


@contextmanager
def full_disk() -> Iterator[None]:
    """Every file that is put in its place finds the disk full."""

    def no_space(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        yield


# --- the store ----------------------------------------------------------------------------------------------------


def test_within_the_budget_nothing_is_packed_and_the_very_object_comes_back(tmp_path: Path) -> None:
    stores, one = ClientStores(tmp_path / "stores", SCHEMA, 2 * SIZE), store(1)
    stores["a"], stores["b"] = one, store(2)
    assert stores["a"] is one
    assert not (tmp_path / "stores").exists()


def test_beyond_the_budget_the_least_recently_used_is_written_and_comes_back_equal(tmp_path: Path) -> None:
    stores = ClientStores(tmp_path, SCHEMA, 2 * SIZE)
    stores["a"], stores["b"] = store(1), store(2)
    assert is_live(stores["a"])  # now b is the one that was not used for longest
    stores["c"] = store(3)
    assert {client: is_live(kept) for client, kept in stores.items()} == {"a": True, "b": False, "c": True}
    assert {client: number_on(kept) for client, kept in stores.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert len(files(tmp_path)) == 1


def test_a_budget_of_nothing_keeps_everything_on_disk(tmp_path: Path) -> None:
    stores = ClientStores(tmp_path, SCHEMA, 0)
    for client in "abc":
        stores[client] = store(ord(client))
    assert not any(is_live(kept) for kept in stores.values())
    assert number_on(stores["b"]) == ord("b")


def test_a_client_that_is_read_from_disk_displaces_nobody(tmp_path: Path) -> None:
    stores = ClientStores(tmp_path, SCHEMA, SIZE)
    stores["a"], stores["b"] = store(1), store(2)
    assert number_on(stores["a"]) == 1.0
    assert is_live(stores["b"])


def test_only_what_was_assigned_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[str]()

    def counting(value: Any, schema: Schema = SCHEMA) -> bytes:
        written.append(value.client)
        return pack(value)

    pack = module.pack
    monkeypatch.setattr(module, "pack", counting)
    stores = ClientStores(tmp_path, SCHEMA, 10 * SIZE)
    for client in "abc":
        stores[client] = store(1)
    first = stores.flush()
    stores["b"] = store(2)
    second = stores.flush()
    assert written == ["a", "b", "c", "b"]
    assert {client for client in first if first[client] != second[client]} == {"b"}
    assert is_live(stores["a"]), "a store that was written stays in memory"
    assert stores.flush() == second
    assert len(written) == 4


@pytest.mark.parametrize("budget", [0, 3 * SIZE, 100 * SIZE])
def test_it_is_a_dict(budget: int, tmp_path: Path) -> None:
    """Whatever is done to a dict and to the stores, in whatever order: they hold the same."""
    draw, plain, stores = random.Random(budget), dict[str, ClientStore](), ClientStores(tmp_path, SCHEMA, budget)
    for step in range(300):
        client, what = draw.choice("abcdefgh"), draw.random()
        if what < 0.5:
            plain[client] = stores[client] = store(step, step)
        elif what < 0.6:
            assert (plain.pop(client, None) is None) == (stores.pop(client, None) is None)
        elif what < 0.7:
            names = stores.flush()
            assert names.keys() == plain.keys()
            stores = ClientStores(tmp_path, SCHEMA, budget, names)
        assert (client in stores) == (client in plain)
        assert len(stores) == len(plain)
        if client in plain:
            frames = {name: frame_of(value, SCHEMA) for name, value in stores[client].items()}
            assert frames == {name: frame_of(value, SCHEMA) for name, value in plain[client].items()}
    assert sorted(stores) == sorted(plain)
    with pytest.raises(KeyError):
        stores["nobody"]
    with pytest.raises(KeyError):
        del stores["nobody"]


def test_two_clients_who_keep_the_same_do_not_share_a_file(tmp_path: Path) -> None:
    stores = ClientStores(tmp_path, SCHEMA, 0)
    stores["a"] = stores["../b"] = store(1)
    assert len(set(stores.flush().values())) == 2
    assert number_on(stores["../b"]) == 1.0


def test_without_a_run_folder_the_disk_is_a_temporary_folder_that_holds_one_file_a_client() -> None:
    stores = ClientStores(None, SCHEMA, 0)
    for step in range(3):
        stores["a"], stores["b"] = store(step), store(step)
    folder = stores._folder
    assert len(files(folder)) == 2
    del stores
    gc.collect()
    assert not folder.exists()


def test_a_damaged_and_a_missing_file_are_told_with_the_client(tmp_path: Path) -> None:
    stores = ClientStores(tmp_path, SCHEMA, 0)
    stores["a"], stores["b"] = store(1), store(2)
    names = stores.flush()
    (tmp_path / f"{names['a']}.bin").unlink()
    path = tmp_path / f"{names['b']}.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] + b"x" + raw[-8:])
    with pytest.raises(WireError, match="the state of a cannot be read"):
        stores["a"]
    with pytest.raises(WireError, match="damaged: its checksum"):
        stores["b"]
    stores = ClientStores(tmp_path, SCHEMA, 0)
    stores["a"], stores["b"] = store(1), store(2)
    names = stores.flush()
    with pytest.raises(WireError, match="found the state of b, expected that of a"):
        ClientStores(tmp_path, SCHEMA, 0, {"a": names["b"]})["a"]


def test_a_full_disk_is_told_in_words_when_a_shelf_is_put_aside(tmp_path: Path) -> None:
    stores = ClientStores(tmp_path, SCHEMA, SIZE)
    stores["a"] = store(1)
    with full_disk(), pytest.raises(RunFolderError, match=r"No space left on device.*free some space and resume"):
        stores["b"] = store(2)
    assert number_on(stores["a"]) == 1.0
    assert not any(name.endswith(".bin") for name in files(tmp_path))


# --- checkpoints --------------------------------------------------------------------------------------------------


class Run:
    """A folder whose clients' states are numbers."""

    def __init__(self, path: Path, budget: int = 100 * SIZE) -> None:
        self.folder, self.budget = RunFolder.create(path), budget
        self.stores = ClientStores(self.folder.stores, SCHEMA, budget)
        self.index = 0

    def round(self, **states: float) -> None:
        """A round in which these clients change."""
        self.index += 1
        for client, number in states.items():
            self.stores[client] = store(number, self.index)
        event = {"index": self.index, "clients": sorted(self.stores)}
        self.folder.save(Checkpoint(self.index, b"", {}), self.stores, event)

    def latest(self) -> tuple[int, Mapping[str, float], list[str]]:
        found = self.folder.latest()
        assert found is not None
        stores = ClientStores(self.folder.stores, SCHEMA, self.budget, found[1])
        return found[0].round, {client: number_on(kept) for client, kept in sorted(stores.items())}, found[3]


@pytest.mark.parametrize("budget", [0, 100 * SIZE])
def test_a_checkpoint_comes_back_as_it_was_saved(budget: int, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", budget)
    assert run.folder.latest() is None
    run.round(a=1, b=2)
    assert run.latest() == (1, {"a": 1, "b": 2}, [])
    run.round(b=3, c=4)
    assert run.latest() == (2, {"a": 1, "b": 3, "c": 4}, [])


def test_files_that_no_kept_checkpoint_names_are_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.round(a=1, b=1)
    (run.folder.stores / "0123.tmp").write_bytes(b"half")
    (run.folder.stores / "4567.bin").write_bytes(b"never named")
    for index in range(2, 6):
        run.round(a=index)
    named = set[str]()
    for state in sorted((run.folder.path / "state").glob("round_*")):
        named |= set(json.loads((state / "clients.json").read_text()).values())
    assert files(run.folder.stores) == {f"{name}.bin" for name in named}
    assert len(named) == 3  # a after rounds 4 and 5, b after round 1


def test_what_a_killed_process_put_aside_is_not_part_of_the_last_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", budget=0)
    run.round(a=1, b=1)
    run.stores["a"] = store(9, 2)  # on disk at once, but of a round that never ended
    assert run.latest() == (1, {"a": 1, "b": 1}, [])


@pytest.mark.parametrize("harm", ["missing", "short", "flipped", "list", "client"])
def test_a_checkpoint_with_a_damaged_part_is_passed_over_for_the_one_before(harm: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.round(a=1, b=1)
    run.round(a=2)
    listing = run.folder.path / "state" / "round_0002" / "clients.json"
    names = json.loads(listing.read_text())
    path = run.folder.stores / f"{names['a']}.bin"
    raw = path.read_bytes()
    match harm:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(raw[:-1])
        case "flipped":
            path.write_bytes(raw[:40] + bytes([raw[40] ^ 1]) + raw[41:])
        case "list":
            listing.write_text(listing.read_text()[:-3])
        case "client":
            listing.write_text(json.dumps({"b": names["b"]}))
    index, states, damage = run.latest()
    assert (index, states) == (1, {"a": 1, "b": 1})
    assert len(damage) == 1 and "round_0002 is damaged (" in damage[0]


def test_a_file_that_both_checkpoints_name_and_that_is_gone_leaves_no_whole_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.round(a=1, b=1)
    run.round(a=2)
    (run.folder.stores / f"{run.stores.flush()['b']}.bin").unlink()
    with pytest.raises(RunFolderError, match=r"the state of b is missing.*No whole checkpoint is left"):
        run.folder.latest()


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_space_mends_it(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.round(a=1, b=1)
    with full_disk(), pytest.raises(RunFolderError, match="No space left on device"):
        run.round(a=2)
    assert run.latest() == (1, {"a": 1, "b": 1}, [])
    run.index = 1
    run.round(a=2)
    assert run.latest() == (2, {"a": 2, "b": 1}, [])


def test_opened_takes_a_record_or_its_frame() -> None:
    model = KeptModel({"layer.A": torch.ones(64)})
    frame = frame_of(model, SCHEMA)
    assert unpacked(KeptModel, model, SCHEMA) is model
    assert frame_of(frame, SCHEMA) is frame
    assert image(unpacked(KeptModel, frame, SCHEMA)) == image(model)
