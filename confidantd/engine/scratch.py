"""Arrays in a file without a name: their memory returns whenever it is needed elsewhere."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from confidantd.errors import StorageError

_ALIGNMENT = 64


class Region:
    """An array that is written in parts; `array` is a read-only map of it."""

    def __init__(self, descriptor: int, start: int, array: NDArray[Any]) -> None:
        self._descriptor, self._start = descriptor, start
        self.array = array

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Rows from the `first` on; `StorageError` where the disk is full."""
        data = np.ascontiguousarray(rows, self.array.dtype).reshape(-1).view(np.uint8)
        at = self._start + first * self.array.nbytes // len(self.array)
        try:
            while len(data):
                done = os.pwrite(self._descriptor, data.data, at)
                data, at = data[done:], at + done
        except OSError as failure:
            raise StorageError(
                f"there is no room to unpack the model ({failure.strerror})",
                "free some disk space",
            ) from None


class Scratch:
    """Room for arrays of `size` bytes at the most, in `folder`. The arrays outlive the context."""

    def __init__(self, folder: Path, size: int) -> None:
        shape = (max(size, 1),)
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
                os.truncate(file.fileno(), shape[0])
                self._map = np.memmap(file, np.uint8, mode="r", shape=shape)
                self._descriptor, self._open = file.fileno(), stack.pop_all()
        except (OSError, OverflowError) as failure:
            reason = getattr(failure, "strerror", None) or "too large"
            raise StorageError(f"cannot write in {folder} ({reason})") from None
        self._end = 0

    @staticmethod
    def room(size: int) -> int:
        """What an array of so many bytes takes."""
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def region(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Region:
        """A new array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start, self._end = self._end, self._end + self.room(size)
        array = self._map[start : start + size].view(dtype).reshape(shape)
        return Region(self._descriptor, start, array)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()
