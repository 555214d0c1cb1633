"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from confidantd.errors import StorageError

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)  # Android's FUSE


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` with `data`, flushed to the disk; `StorageError` leaves the old file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as failure:
        raise storage_error(path, failure) from None


def sync_folder(folder: Path) -> None:
    """Bring a rename in `folder` to the disk, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def storage_error(path: Path, failure: OSError) -> StorageError:
    """What a failed write means to the user."""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"the disk is full: {path} was not written", "free some disk space")
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{path} may not be written ({failure.strerror})", "correct its owner")
    return StorageError(f"{path} cannot be used ({failure.strerror})", "check the disk")
