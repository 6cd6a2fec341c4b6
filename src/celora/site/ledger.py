"""The ledger: one line for each frame that left the site, in a file that is only appended to.

A line is on the disk before its frame is handed to the network. So a process that is killed may leave a line for a
frame that did not make it, and never a frame without a line. (One exception: where a full disk allows no line, the
notice that says so leaves without one; it has no content.)

Each line holds the SHA-256 of the one before it: a line that was changed, removed or put in between is noticed by the
next. Not noticed is what happens to the very last line, nor a chain that was computed anew; against those, keep a copy
of the file, or of its last hash, elsewhere.

A line that was cut off, by a killed process or a full disk, stays where it is. It gets its line end and a note after
it, and the chain goes on over both.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from celora.errors import RunFolderError
from celora.track.disk import owners, sync, writing
from celora.track.folder import stamped

FIRST = "0" * 64
"""`previous` of the first line."""
PATIENCE = 60.0
"""Seconds to wait for another process that is writing a line."""


@dataclass(frozen=True)
class Entry:
    """A frame that left.

    Attributes:
        time: UTC, ISO 8601.
        round: 0 before training.
        kind: the record in it, such as "fedit.Up" (`celora.wire.records.name_of`).
        bytes: length of the frame.
        sha256: of the frame.
        previous: SHA-256 of the line before, without its line end.
    """

    time: str
    federation: str
    job: str
    client: str
    round: int
    kind: str
    bytes: int
    sha256: str
    previous: str


class Ledger:
    """The ledger in a file. Several processes may share it; what one appends, the others count before they append.

    Raises:
        RunFolderError: if the file cannot be read or written, or has become shorter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(path.name + ".lock"), timeout=PATIENCE, mode=0o600, thread_local=False)
        self._at, self._lines, self._previous = 0, 0, FIRST  # as far as the file has been read
        self._bytes: Counter[tuple[str, int]] = Counter()
        self._total = 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._held():
            pass

    def append(self, *, federation: str, job: str, client: str, round: int, kind: str, frame: bytes) -> None:
        """Write a frame's line and flush it to the disk; only then may the frame leave.

        Raises:
            RunFolderError: if the line cannot be written: the frame must not leave.
        """
        event = {"federation": federation, "job": job, "client": client, "round": round, "kind": kind}
        content = {"bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}
        with self._held() as file:
            self._write(file, {**event, **content}, self._previous)

    def sent(self, federation: str, round: int) -> int:
        """Bytes that left in this round of this federation."""
        return self._bytes[federation, round]

    def total(self) -> int:
        """Bytes that ever left."""
        return self._total

    def entries(self) -> Iterator[Entry]:
        """All frames that left, oldest first."""
        with open(self.path, "rb") as file:
            for line in file:
                if entry := _entry(_parsed(line)):
                    yield entry

    def verify(self) -> list[str]:
        """What is wrong with the file, read from its beginning: which line, what was found; nothing if it is whole."""
        problems, previous = list[str](), FIRST
        with self._held(), open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                found = _parsed(line)
                if _entry(found) is None and "damaged" not in found:
                    problems.append(
                        f"line {number}: found {line[:40]!r}, expected an entry; what it told is not counted"
                    )
                elif found["previous"] != previous:
                    problems.append(
                        f"line {number}: found previous = {found['previous'][:12]}…, expected {previous[:12]}…, the "
                        "SHA-256 of the line before: a line was changed, removed or put in between"
                    )
                if "damaged" in found:
                    problems.append(f"line {number}: {found['damaged']}")
                previous = _hash(line)
        return problems

    @contextmanager
    def _held(self) -> Iterator[BinaryIO]:
        """The file, to append to; what others have appended meanwhile is counted, and what is appended here too."""
        with writing(self.path), self._alone(), open(self.path, "ab", opener=owners) as file:
            if file.tell() == 0:
                sync(self.path.parent)
            if cut := self._read():
                note = f"line {self._lines + 1} was cut off while it was written: its frame had not left"
                self._write(file, {"damaged": note}, _hash(cut), b"\n")
                self._read()
            yield file
            self._read()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self._lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"{self.path} was held by another process for {PATIENCE:g} s, expected for moments: end that process. "
                "Nothing leaves until then"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    def _write(self, file: BinaryIO, event: dict[str, Any], previous: str, before: bytes = b"") -> None:
        line = json.dumps({**stamped(event), "previous": previous}, ensure_ascii=False)
        file.write(before + line.encode("utf-8", "surrogatepass") + b"\n")  # a client's name may be no Unicode
        file.flush()
        os.fsync(file.fileno())

    def _read(self) -> bytes:
        """Count the lines that are new; what comes after the last line end, if anything does."""
        with open(self.path, "rb") as file:
            if (size := file.seek(0, os.SEEK_END)) < self._at:
                raise RunFolderError(
                    f"{self.path}: found {size} bytes, expected at least the {self._at} that were read before: it was "
                    "shortened while in use. Nothing leaves; restore the file, and start again"
                )
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return line
                if entry := _entry(_parsed(line)):
                    self._bytes[entry.federation, entry.round] += entry.bytes
                    self._total += entry.bytes
                self._at, self._lines, self._previous = self._at + len(line), self._lines + 1, _hash(line)
        return b""


def _hash(line: bytes) -> str:
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    """What a line holds; nothing if it is neither an entry nor a note."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and isinstance(value.get("previous"), str) else {}


def _entry(found: dict[str, Any]) -> Entry | None:
    types = {field.name: field.type for field in fields(Entry)}
    if {name: type(value) for name, value in found.items()} != types or min(found["bytes"], found["round"]) < 0:
        return None
    return Entry(**found)
