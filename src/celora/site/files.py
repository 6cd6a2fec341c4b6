"""New files, and what only their owner may read."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from celora.errors import RunFolderError

PRIVATE = ".key"
"""The suffix of what only its owner may read."""


def open_to_others(path: Path) -> bool:
    """Whether anybody but its owner may read, write or enter `path`; where files have no such modes, nobody may.

    Raises:
        OSError: if there is no such file or folder.
    """
    return bool(path.stat().st_mode & 0o077) and os.name == "posix"


def closing(path: Path) -> str:
    """The command that closes `path` to others."""
    return f"`chmod {'700' if path.is_dir() else '600'} {shlex.quote(str(path))}`"


def write_new(files: Mapping[Path, bytes]) -> list[Path]:
    """Write files that are not there yet; *.key are their owner's only, and so are the folders they are in.

    Folders that are there already keep their modes.

    Returns:
        What was written.

    Raises:
        RunFolderError: if one of the files is there already, others may enter a folder that is to hold a *.key, or
            something cannot be written. Only in the last case may some of the files be there afterwards.
    """
    if there := [str(path) for path in files if os.path.lexists(path)]:
        raise RunFolderError(
            f"there already: {', '.join(there)}; keys and certificates are never overwritten. Choose another folder, "
            "or move them away"
        )
    private = {path.parent for path in files if path.suffix == PRIVATE}
    for folder in dict.fromkeys(path.parent for path in files if path.parent in private):
        if folder.is_dir() and open_to_others(folder):
            raise RunFolderError(
                f"{folder} is to hold a private key, and others on this machine can enter it: {closing(folder)}, "
                "or choose a new folder"
            )
    for path, content in files.items():
        owned = path.suffix == PRIVATE
        try:
            path.parent.mkdir(mode=0o700 if path.parent in private else 0o777, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(path, flags, 0o600 if owned else 0o644), "wb") as file:
                file.write(content)
        except OSError as error:
            raise RunFolderError(
                f"cannot write {path} ({error.strerror}); check the disk and the folder's permissions, delete what was "
                "written before it, and try again"
            ) from error
    return list(files)
