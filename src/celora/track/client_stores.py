"""The clients' stores: those used last in memory, as they are; all others on disk, as frames."""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from celora.core.algorithm import ClientId
from celora.core.client_state import ClientStore, frame_of
from celora.errors import WireError
from celora.track.disk import sync, writing
from celora.wire import Schema, contents, pack, record, unpack

NAME = 32
"""Hexadecimal digits of SHA-256 in a file's name."""


@record
class _Kept:
    client: str
    store: Mapping[str, bytes]


class ClientStores(MutableMapping[ClientId, ClientStore]):
    """client -> store. A store that is changed must be assigned again; only then is the change kept.

    A file is named by the SHA-256 of its content, so what a name stands for never changes, and a checkpoint is a list
    of names. Nothing is packed before it is written: when `flush` is called, or when the budget is exceeded.

    Args:
        folder: where the files are; None: a temporary folder, deleted with this object.
        schema: of the frames.
        budget: bytes of tensors and frames in memory. What two values share counts twice.
        names: client -> its file, as `flush` gave them.

    Raises:
        WireError: by reading a store whose file is missing or damaged.
        RunFolderError: by writing, if the disk is full.
    """

    def __init__(
        self, folder: Path | None, schema: Schema, budget: int, names: Mapping[ClientId, str] | None = None
    ) -> None:
        self._temporary = folder is None
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="celora-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder, self._schema, self._budget = folder, schema, budget
        self._names = dict(names or {})
        self._live: dict[ClientId, ClientStore] = {}  # least recently used first
        self._sizes: dict[ClientId, int] = {}
        self._changed: set[ClientId] = set()  # live, and not yet in a file
        self._unsynced: set[str] = set()

    def __getitem__(self, client: ClientId) -> ClientStore:
        if client in self._live:
            self._live[client] = self._live.pop(client)
            return self._live[client]
        path = place(self._folder, self._names[client])
        try:
            kept = unpack(_Kept, path.read_bytes())
        except OSError as error:
            raise WireError(f"the state of {client} cannot be read: {error}") from error
        if kept.client != client:
            raise WireError(f"{path}: found the state of {kept.client}, expected that of {client}")
        return dict(kept.store)

    def __setitem__(self, client: ClientId, store: ClientStore) -> None:
        self._live.pop(client, None)
        self._live[client] = store
        self._sizes[client] = sum(size for kept in store.values() for _, size in contents(kept))
        self._changed.add(client)
        while sum(self._sizes.values()) > self._budget:
            oldest = next(iter(self._live))
            self._write(oldest)
            del self._live[oldest], self._sizes[oldest]

    def __delitem__(self, client: ClientId) -> None:
        if client not in self:
            raise KeyError(client)
        for of_client in (self._live, self._sizes, self._names):
            of_client.pop(client, None)
        self._changed.discard(client)

    def __contains__(self, client: object) -> bool:
        return client in self._live or client in self._names

    def __iter__(self) -> Iterator[ClientId]:
        return iter(dict.fromkeys([*self._names, *self._live]))

    def __len__(self) -> int:
        return len(self._names.keys() | self._live.keys())

    def flush(self) -> dict[ClientId, str]:
        """Write what has changed and flush it to the disk; client -> the name of its file."""
        for client in sorted(self._changed):
            self._write(client)
        with writing(self._folder):
            for name in self._unsynced:
                sync(place(self._folder, name))
            if self._unsynced:
                sync(self._folder)
        self._unsynced.clear()
        return dict(self._names)

    def _write(self, client: ClientId) -> None:
        if client not in self._changed:
            return
        kept = {name: frame_of(value, self._schema) for name, value in self._live[client].items()}
        frame = pack(_Kept(client, kept))
        name, replaced = hashlib.sha256(frame).hexdigest()[:NAME], self._names.get(client)
        target = place(self._folder, name)
        with writing(target):
            self._folder.mkdir(parents=True, exist_ok=True)
            target.with_suffix(".tmp").write_bytes(frame)
            os.replace(target.with_suffix(".tmp"), target)
        self._names[client] = name
        self._unsynced.add(name)
        self._changed.discard(client)
        if self._temporary and replaced not in (None, name):  # in a run folder a checkpoint may name it
            place(self._folder, str(replaced)).unlink()


def place(folder: Path, name: str) -> Path:
    """Where the file of this name is."""
    return folder / f"{name}.bin"


def verify_files(folder: Path, names: Mapping[ClientId, str]) -> None:
    """Read every file once and hold it against its name.

    Raises:
        WireError: naming a client whose file is missing or damaged.
    """
    for client, name in names.items():
        try:
            with open(place(folder, name), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()[:NAME]
        except FileNotFoundError:
            raise WireError(f"the state of {client} is missing") from None
        if found != name:
            raise WireError(f"the state of {client} is damaged: its checksum does not match its content")


def sweep(folder: Path, named: set[str]) -> None:
    """Delete the files that no checkpoint names, what a killed process left included."""
    for file in list(folder.iterdir()) if folder.exists() else []:
        if file.suffix != ".bin" or file.stem not in named:
            file.unlink()
