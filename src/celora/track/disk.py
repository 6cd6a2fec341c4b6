"""Writing so that a file is whole or absent, and so that a full disk is told in words."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from celora.errors import RunFolderError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails in here, fails because `path` cannot be written.

    Raises:
        RunFolderError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the folder's permissions"
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}. Nothing written so far is lost; {hint} and resume the run"
        ) from error


def owners(path: str, flags: int) -> int:
    """An opener of files that are for their owner alone (mode 0600), whatever the umask says and whatever they were."""
    descriptor = os.open(path, flags, 0o600)
    try:
        os.chmod(path, 0o600)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def put(path: Path, content: bytes, opener: Callable[[str, int], int] | None = None) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb", opener=opener) as file:
        file.write(content)
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_name(client: str) -> str:
    """A client's folder: its name, but for what would lead elsewhere."""
    return client.replace("/", "-").replace("\\", "-") if client.strip(".") else f"client {client}"
