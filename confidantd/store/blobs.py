"""Content-addressed files: a blob is named by the SHA-256 of its bytes.

A blob is a file of its own under `blobs/`, or a registered range of another file
(a tensor inside a model's safetensors file), which is not copied.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from confidantd.errors import CorruptFileError
from confidantd.ids import Digest
from confidantd.store.files import storage_error, write_atomically

READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Range:
    path: Path
    offset: int
    length: int
    modified_ns: int
    size: int


class BlobStore:
    """Blobs of one device. Blocking: call it in a thread where files may be large."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._ranges: dict[Digest, _Range] = {}
        self._lock = threading.Lock()
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise storage_error(self._blobs, failure) from None

    def path(self, digest: Digest) -> Path:
        """Where the blob's own file is, or would be."""
        return self._blobs / digest

    def part_path(self, digest: Digest) -> Path:
        """Where an unfinished fetch of the blob is kept."""
        return self._blobs / f"{digest}.part"

    def locate(self, digest: Digest) -> tuple[Path, int, int] | None:
        """File, offset and length of a blob, or None if it is not here (any more)."""
        path = self.path(digest)
        try:
            return path, 0, path.stat().st_size
        except OSError:
            pass
        with self._lock:
            found = self._ranges.get(digest)
        if found is None or not _unchanged(found):
            return None
        return found.path, found.offset, found.length

    def register(self, digest: Digest, path: Path, offset: int, length: int) -> None:
        """Serve a range of a file as a blob, as long as the file is not changed."""
        status = path.stat()
        entry = _Range(path, offset, length, status.st_mtime_ns, status.st_size)
        with self._lock:
            self._ranges[digest] = entry

    def put_bytes(self, data: bytes) -> Digest:
        """Store bytes; gives their digest."""
        digest = Digest(hashlib.sha256(data).hexdigest())
        if not self.path(digest).exists():
            write_atomically(self.path(digest), data)
        return digest

    def put_file(self, path: Path) -> Digest:
        """Move a file into the store; gives its digest."""
        digest = hash_range(path, 0, path.stat().st_size)
        try:
            shutil.move(path, self.path(digest))
        except OSError as failure:
            raise storage_error(self.path(digest), failure) from None
        return digest

    def remove(self, digest: Digest) -> None:
        """Forget a blob that has a file of its own."""
        self.path(digest).unlink(missing_ok=True)

    def finish(self, digest: Digest) -> Path:
        """Verify a complete `.part` file and give it its name; `CorruptFileError` removes it."""
        part = self.part_path(digest)
        if hash_range(part, 0, part.stat().st_size) != digest:
            part.unlink()
            raise CorruptFileError(
                f"a received blob is not what was promised ({digest[:12]})", "try again"
            )
        try:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path(digest))
        except OSError as failure:
            raise storage_error(part, failure) from None
        return self.path(digest)


def hash_range(path: Path, offset: int, length: int) -> Digest:
    """SHA-256 of a range of a file; `CorruptFileError` if the file is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        left = length
        while left:
            data = file.read(min(left, READ_BYTES))
            if not data:
                raise CorruptFileError(f"{path} is shorter than its header says")
            digest.update(data)
            left -= len(data)
    return Digest(digest.hexdigest())


def _unchanged(entry: _Range) -> bool:
    try:
        status = entry.path.stat()
    except OSError:
        return False
    return (status.st_mtime_ns, status.st_size) == (entry.modified_ns, entry.size)
