"""What a client keeps at its site, on disk: each value is whole, whatever moment a process is killed at."""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from celora.core.client_state import frame_of
from celora.errors import FederationError, WireError
from celora.track.disk import owners, put, sync, writing
from celora.wire import Schema

SUFFIX, TEMPORARY = ".bin", ".tmp"


class SiteStore(MutableMapping[str, object]):
    """A `celora.core.client_state.ClientStore` in a folder that is for its owner alone: `private@3.bin` and so on.

    A value is written to a temporary name, flushed and renamed; `keep` writes none that has not changed. Read, it is
    its frame (`celora.core.client_state.unpacked`). The folder is held until `close`, or the end of the process.

    Args:
        folder: made if it is missing; mode 0700, its files 0600, whatever they were.
        schema: of the frames.

    Raises:
        FederationError: if another process holds the folder.
        RunFolderError: if it cannot be written, as on a full disk; what was kept before is intact.
        WireError: by reading a value whose file cannot be read.
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self._schema = folder, schema
        self._lock = FileLock(folder / ".lock", timeout=0, mode=0o600, thread_local=False)
        with writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            try:
                self._lock.acquire()
            except Timeout:
                raise FederationError(
                    f"{folder} is in use by another process of this site: wait for it, or end it; two clients need two "
                    "folders"
                ) from None
            for left_over in folder.glob(f"*{TEMPORARY}"):
                left_over.unlink()
            for file in folder.glob(f"*{SUFFIX}"):
                file.chmod(0o600)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep(self, store: Mapping[str, object]) -> None:
        """Keep what `store` holds, and nothing else.

        What is new or changed is written before anything is removed. In between there is more than is needed, which
        does no harm: an update starts from the last private state of an earlier round, and a model that nobody asks for
        is forgotten in the next update (`celora.core.client`).
        """
        for name, value in store.items():
            frame = frame_of(value, self._schema)
            if name not in self or self[name] != frame:
                self[name] = frame
        for name in [name for name in self if name not in store]:
            del self[name]

    def __getitem__(self, name: str) -> bytes:
        try:
            return self._place(name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None
        except OSError as error:
            raise WireError(f"{self._place(name)} cannot be read: {error.strerror}; check who owns it") from error

    def __setitem__(self, name: str, value: object) -> None:
        frame, target = frame_of(value, self._schema), self._place(name)
        temporary = target.with_name(target.name + TEMPORARY)
        with writing(target):
            try:
                put(temporary, frame, opener=owners)
                os.replace(temporary, target)
            except OSError:
                with suppress(OSError):
                    temporary.unlink()  # on a full disk its room is needed
                raise
            sync(self.folder)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        with writing(self.folder):
            self._place(name).unlink()
            sync(self.folder)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._place(name).exists()

    def __iter__(self) -> Iterator[str]:
        return (unquote(file.name.removesuffix(SUFFIX)) for file in sorted(self.folder.glob(f"*{SUFFIX}")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _place(self, name: str) -> Path:
        """The file of this name, which cannot leave the folder: "a/b" is a%2Fb.bin."""
        return self.folder / f"{quote(name, safe='@')}{SUFFIX}"
