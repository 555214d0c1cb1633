"""Two stages of one job on one device take turns at its processor, as its plan assumes."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


class Turns:
    """A turn is held by one process at a time: a lock on a file. An empty path is nobody else's."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("ab") if path else None  # noqa: SIM115  # see `close`

    @property
    def shared(self) -> bool:
        """Whether there is another one who computes here."""
        return self._file is not None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for it; blocks. Whatever computes in it must not wait for another stage."""
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """No more turns."""
        if self._file is not None:
            self._file.close()
