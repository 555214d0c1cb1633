"""One daemon per home: a lock that the kernel releases when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from confidantd.errors import DaemonRunningError, StorageError

LOCK_NAME = "daemon.lock"


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold the lock of `home`, which is created if needed; `DaemonRunningError` if it is held."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(home / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as failure:
        raise StorageError(
            f"the home {home} cannot be used ({failure.strerror})",
            "choose another one with --home, or correct its owner",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DaemonRunningError(
            f"a daemon is already running for {home}", "stop it, or give this one another --home"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
