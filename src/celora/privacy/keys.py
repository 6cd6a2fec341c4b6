"""One secret of 32 bytes that all clients hold and the server does not; everything else is derived from it.

The sites agree on it without the server: one makes it by `celora keys secret FILE` and carries it to the others by a
way that they trust. There is no other channel between clients here, and one that leads through the server would have to
keep it from the server.
"""

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from celora.errors import RunFolderError

SIZE = 32
SIMULATED = hashlib.sha256(b"celora: everybody can read this key, so it protects nobody").digest()
"""For simulations, in which one process is all clients and the server: there is nobody to hide from."""


def make(path: str | Path) -> None:
    """Write a new secret to a new file, 64 hexadecimal digits, readable by its owner only.

    Raises:
        RunFolderError: if the file cannot be written, or is there already: what was encrypted with the secret in it
            would be lost.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(SIZE) + "\n")
    except FileExistsError:
        raise RunFolderError(f"{path} is there already: keys are never overwritten. Choose another file") from None
    except OSError as error:
        raise RunFolderError(f"cannot write {path} ({error.strerror}): choose another folder, or make it") from error


def read(path: str | Path) -> bytes:
    """The secret in a file.

    Raises:
        ValueError: if there is no such file, or no secret in it.
    """
    hint = "expected 64 hexadecimal digits, as `celora keys secret` writes them; all clients need the same file"
    try:
        secret = bytes.fromhex(Path(path).read_text(encoding="ascii"))
    except OSError as error:
        raise ValueError(f"key: cannot read {path} ({error.strerror}); {hint}") from None
    except ValueError:
        raise ValueError(f"key: {path} holds something else; {hint}") from None
    if len(secret) != SIZE:
        raise ValueError(f"key: found {len(secret)} bytes in {path}; {hint}")
    return secret


def mark(secret: bytes) -> bytes:
    """8 bytes by which two sites find that they hold different secrets; whoever reads them learns no more."""
    return derived(secret, "mark")[:8]


def derived(secret: bytes, purpose: str, content: bytes = b"") -> bytes:
    """64 bytes by HMAC-SHA512, unrelated for two purposes or contents, and telling nothing of the secret."""
    return hmac.digest(secret, json.dumps(purpose).encode() + b"\0" + content, "sha512")
