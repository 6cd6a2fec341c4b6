"""celora.site.ledger: no frame without a line; a line that was cut off or changed is told."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from threading import Thread

import pytest
from filelock import FileLock

from celora.errors import RunFolderError
from celora.site.ledger import FIRST, Ledger
from celora.track import disk


def enter(ledger: Ledger, frame: bytes, round: int = 1, federation: str = "north", client: str = "site-a") -> None:
    ledger.append(federation=federation, job="fedit-1", client=client, round=round, kind="messages.Reply", frame=frame)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of three frames: 3, 5 and 7 bytes."""
    path = tmp_path / "site" / "ledger.jsonl"
    ledger = Ledger(path)
    for round, size in enumerate((3, 5, 7)):
        enter(ledger, b"x" * size, round)
    return path


def test_a_line_tells_all_of_its_frame_and_none_of_its_content(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    enter(ledger, b"the frame", round=2)
    enter(ledger, b"another", round=3)
    first, second = lines(ledger.path)
    entry = json.loads(first)
    assert list(entry) == ["time", "federation", "job", "client", "round", "kind", "bytes", "sha256", "previous"]
    assert entry["time"].endswith("+00:00")
    del entry["time"]
    assert entry == {
        "federation": "north",
        "job": "fedit-1",
        "client": "site-a",
        "round": 2,
        "kind": "messages.Reply",
        "bytes": 9,
        "sha256": hashlib.sha256(b"the frame").hexdigest(),
        "previous": FIRST,
    }
    assert json.loads(second)["previous"] == hashlib.sha256(first.encode()).hexdigest()
    assert [(found.round, found.bytes) for found in ledger.entries()] == [(2, 9), (3, 7)]


def test_bytes_are_counted_by_round_and_in_all_also_after_opening_again(path: Path) -> None:
    for ledger in (Ledger(path), Ledger(path)):
        assert [ledger.sent("north", round) for round in range(4)] == [3, 5, 7, 0]
        assert ledger.sent("south", 1) == 0
        assert ledger.total() == 15
    enter(ledger, b"xx", round=1)
    enter(ledger, b"x", round=1, federation="south")
    assert (ledger.sent("north", 1), ledger.sent("south", 1), ledger.total()) == (7, 1, 18)
    assert Ledger(path).verify() == []


def test_the_line_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, synced = Ledger(tmp_path / "ledger.jsonl"), list[bytes]()
    flush = os.fsync

    def watching(descriptor: int) -> None:
        synced.append(ledger.path.read_bytes())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    enter(ledger, b"frame")
    assert synced[-1] == ledger.path.read_bytes() != b""


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_only_the_owner_may_read_it(tmp_path: Path, umask: int) -> None:
    (tmp_path / "wide.jsonl").touch()
    (tmp_path / "wide.jsonl").chmod(0o666)
    before = os.umask(umask)
    try:
        for name in ("new.jsonl", "wide.jsonl"):
            enter(Ledger(tmp_path / name), b"frame")
    finally:
        os.umask(before)
    for name in ("new.jsonl", "wide.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_was_cut_off_stays_and_is_told_and_the_chain_goes_on(path: Path, left: int) -> None:
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    cut = whole[: start + left] if left > 0 else whole[:-2]
    path.write_bytes(cut)
    ledger = Ledger(path)
    enter(ledger, b"xx", round=9)
    begins = (cut + b"\n")[start : start + 40]
    assert path.read_bytes().startswith(cut + b"\n")
    assert [found.bytes for found in ledger.entries()] == [3, 5, 2]
    assert (ledger.total(), ledger.sent("north", 2)) == (10, 0)
    assert Ledger(path).verify() == [
        f"line 3: found {begins!r}, expected an entry; what it told is not counted",
        "line 4: line 3 was cut off while it was written: its frame had not left",
    ]


def test_a_line_without_its_end_counts(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    ledger = Ledger(path)
    assert ledger.total() == 15  # rather one frame too many than one too few
    assert ledger.verify() == ["line 4: line 3 was cut off while it was written: its frame had not left"]


def test_a_cut_off_note_is_noted_too(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    Ledger(path)
    path.write_bytes(path.read_bytes()[:-5])
    ledger = Ledger(path)
    enter(ledger, b"xx")
    assert [problem[:14] for problem in ledger.verify()] == ["line 3: found ", "line 4: found ", "line 5: line 4"]
    assert ledger.total() == 10


def test_an_edited_line_is_told_by_the_next(path: Path) -> None:
    first, second, third = lines(path)
    edited = second.replace('"bytes": 5', '"bytes": 1')
    path.write_text("\n".join([first, edited, third]) + "\n")
    found, expected = hashlib.sha256(second.encode()).hexdigest(), hashlib.sha256(edited.encode()).hexdigest()
    assert Ledger(path).verify() == [
        f"line 3: found previous = {found[:12]}…, expected {expected[:12]}…, the SHA-256 of the line before: a line "
        "was changed, removed or put in between"
    ]


@pytest.mark.parametrize("order", [(0, 2), (1, 2), (0, 0, 1, 2), (1, 0, 2)])
def test_lines_removed_doubled_or_moved_are_told(path: Path, order: tuple[int, ...]) -> None:
    before = lines(path)
    path.write_text("".join(before[place] + "\n" for place in order))
    assert "expected" in Ledger(path).verify()[0]


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[1]", "null", '"text"', "\0\0\0", "[" * 100_000, '{"previous": 3}', '{"previous": "00", "bytes": 5}'],
)
def test_whatever_stands_in_a_line_the_ledger_opens_and_tells(path: Path, line: str) -> None:
    before = lines(path)
    path.write_text("\n".join([*before, line, ""]))
    ledger = Ledger(path)
    assert ledger.total() == 15
    begins = (line.encode() + b"\n")[:40]
    assert ledger.verify() == [f"line 4: found {begins!r}, expected an entry; what it told is not counted"]


@pytest.mark.parametrize(
    ("name", "value"), [("bytes", -5), ("bytes", 5.0), ("bytes", True), ("round", "1"), ("job", 1)]
)
def test_an_entry_of_other_types_is_none(path: Path, name: str, value: object) -> None:
    first, *others = lines(path)
    path.write_text("\n".join([json.dumps({**json.loads(first), name: value}), *others, ""]))
    ledger = Ledger(path)
    assert ledger.total() == 12
    assert ledger.verify()[0].startswith("line 1: found b'{")


def test_a_name_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for client in ("Zürich\n2", "\udcff"):
        enter(ledger, b"frame", client=client)
    assert [found.client for found in ledger.entries()] == ["Zürich\n2", "\udcff"]
    assert ledger.verify() == []


def test_a_full_disk_is_told_and_the_line_it_cut_off_is_noted_when_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(path)

    def half(self: Ledger, file: object, event: object, previous: str, before: bytes = b"") -> None:
        with open(path, "ab") as there:
            there.write(b'{"time": "2')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write", half)
        with pytest.raises(RunFolderError) as full:
            enter(ledger, b"frame")
    assert str(full.value) == (
        f"cannot write {path}: No space left on device. Nothing written so far is lost; free some space and resume the "
        "run"
    )
    assert ledger.total() == 15
    enter(ledger, b"xx")
    assert ledger.total() == 17
    assert [problem[:14] for problem in ledger.verify()] == ["line 4: found ", "line 5: line 4"]


def test_a_line_whose_flush_failed_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(RunFolderError, match="Input/output error"):
            enter(ledger, b"frame", round=5)
    enter(ledger, b"xx", round=5)
    assert ledger.sent("north", 5) == 7
    assert ledger.verify() == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("celora.site.ledger.owners", refused)
    with pytest.raises(RunFolderError, match=r"cannot write .*ledger.jsonl: Permission denied\. .*permissions"):
        Ledger(tmp_path / "ledger.jsonl")


def test_a_ledger_that_was_shortened_while_in_use_lets_nothing_leave(path: Path) -> None:
    ledger = Ledger(path)
    size = path.stat().st_size
    path.write_text(lines(path)[0] + "\n")
    with pytest.raises(RunFolderError) as refused:
        enter(ledger, b"frame")
    assert str(refused.value) == (
        f"{path}: found {path.stat().st_size} bytes, expected at least the {size} that were read before: it was "
        "shortened while in use. Nothing leaves; restore the file, and start again"
    )


def test_what_another_process_appended_is_counted_and_chained(path: Path) -> None:
    one, two = Ledger(path), Ledger(path)
    for _ in range(3):
        enter(one, b"x" * 10, round=7)
        enter(two, b"x", round=7)
    assert (one.verify(), two.verify()) == ([], [])
    assert one.total() == two.total() == 15 + 33


def test_two_at_once_leave_one_chain(path: Path) -> None:
    def many() -> None:
        ledger = Ledger(path)
        for _ in range(10):
            enter(ledger, b"x", round=8)

    others = [Thread(target=many) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    ledger = Ledger(path)
    assert ledger.verify() == []
    assert ledger.sent("north", 8) == 30


def test_while_another_process_writes_nothing_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celora.site.ledger.PATIENCE", 0.01)
    ledger, before = Ledger(path), path.read_bytes()
    with FileLock(f"{path}.lock"), pytest.raises(RunFolderError) as refused:
        enter(ledger, b"frame")
    assert str(refused.value) == (
        f"{path} was held by another process for 0.01 s, expected for moments: end that process. Nothing leaves until "
        "then"
    )
    assert path.read_bytes() == before
    enter(ledger, b"frame")
    assert ledger.total() == 20


def test_appending_reads_no_more_than_the_new_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, parsed = Ledger(path), list[bytes]()
    monkeypatch.setattr("celora.site.ledger._parsed", lambda line: parsed.append(line) or {})
    enter(ledger, b"frame")
    assert len(parsed) == 1


def test_a_file_of_its_owner_is_closed_where_its_mode_cannot_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = list[int]()
    close = os.close

    def refused(path: str, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refused)
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor)))
    with pytest.raises(PermissionError):
        disk.owners(str(tmp_path / "file"), os.O_WRONLY | os.O_CREAT)
    assert len(closed) == 1
