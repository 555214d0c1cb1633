"""Small private files: written whole or not at all, readable by their owner only."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from confidantd.errors import IdentityError, StorageError

PRIVATE_FILE_MODE = 0o600
PRIVATE_FOLDER_MODE = 0o700


def make_private_folder(folder: Path) -> None:
    """Create `folder` (and parents) with mode 0700; an existing one is tightened."""
    try:
        folder.mkdir(mode=PRIVATE_FOLDER_MODE, parents=True, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) != PRIVATE_FOLDER_MODE:
            folder.chmod(PRIVATE_FOLDER_MODE)
    except OSError as failure:
        raise StorageError(
            f"the folder {folder} cannot be used ({failure.strerror})",
            "choose another one with --home, or correct its owner",
        ) from None


def write_private_file(path: Path, data: bytes) -> None:
    """Replace `path` atomically with `data` (mode 0600, flushed to the disk)."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as failure:
        raise StorageError(
            f"{path} cannot be written ({failure.strerror})", "check the disk and its permissions"
        ) from None


def check_private(path: Path) -> None:
    """`IdentityError` if someone else than the owner may read or write `path`."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise IdentityError(
            f"the key {path} is readable by other users (mode {mode:04o})", f"chmod 600 {path}"
        )
