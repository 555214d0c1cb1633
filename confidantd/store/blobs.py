"""Content-addressed files: a blob is named by the SHA-256 of its bytes.

A blob is a file of its own under `blobs/`, or a registered range of another file
(a tensor inside a model's safetensors file), which is not copied. What is only of use
while a job runs, like the state of its training, lies under `passing/`, so that a daemon
that was killed leaves nothing for ever.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import secrets
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from confidantd.errors import CorruptFileError, ProtocolError
from confidantd.ids import Digest, digest_of, is_digest
from confidantd.store.files import storage_error, sync_folder, write_atomically

_log = logging.getLogger(__name__)

READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Range:
    path: Path
    offset: int
    length: int
    modified_ns: int
    size: int


class BlobStore:
    """Blobs of one device. Blocking: call it in a thread where files may be large.

    A file stands under a digest only after its bytes have been hashed and are on the
    disk. `StorageError` where the disk is full, denied or broken.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs, self._passing = root / "blobs", root / "passing"
        self._ranges: dict[Digest, _Range] = {}
        self._lock = threading.Lock()
        self._fetching: WeakValueDictionary[Digest, asyncio.Lock] = WeakValueDictionary()
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._passing.mkdir(exist_ok=True)
        except OSError as failure:
            raise storage_error(self._blobs, failure) from None

    def path(self, digest: Digest, *, passing: bool = False) -> Path:
        """Where the blob's own file is, or would be. Digests come from peers: they name no path."""
        if not is_digest(digest):
            raise ProtocolError("a blob is not named by a SHA-256 digest")
        return (self._passing if passing else self._blobs) / digest

    def part_path(self, digest: Digest, *, passing: bool = False) -> Path:
        """Where an unfinished fetch of the blob is kept."""
        return self.path(digest, passing=passing).with_suffix(".part")

    def forget_passing(self) -> None:
        """What jobs of an earlier run of the daemon left."""
        for path in self._passing.iterdir():
            path.unlink(missing_ok=True)

    def fetch_lock(self, digest: Digest) -> asyncio.Lock:
        """Held by whoever fetches the blob; lives as long as somebody holds or awaits it."""
        return self._fetching.setdefault(digest, asyncio.Lock())

    def locate(self, digest: Digest) -> tuple[Path, int, int] | None:
        """File, offset and length of a blob, or None if it is not here (any more)."""
        for path in (self.path(digest), self.path(digest, passing=True)):
            try:
                return path, 0, path.stat().st_size
            except OSError:
                pass
        with self._lock:
            found = self._ranges.get(digest)
        if found is None or not _unchanged(found):
            return None
        return found.path, found.offset, found.length

    def check(self, digest: Digest) -> tuple[Path, int, int] | None:
        """As `locate`, after its bytes have been hashed again: disks forget.

        A damaged file of its own is removed, a damaged range of another file raises
        `CorruptFileError`. Either can be fetched anew.
        """
        found = self.locate(digest)
        if found is None or hash_range(*found) == digest:
            return found
        path = found[0]
        if path.parent not in (self._blobs, self._passing):
            raise CorruptFileError(f"{path} has changed on the disk", "restore it")
        _log.warning("the blob %s is damaged on this disk: it is removed", path)
        path.unlink(missing_ok=True)
        return None

    def register(self, digest: Digest, path: Path, offset: int, length: int) -> None:
        """Serve a range of a file as a blob, as long as the file is not changed."""
        try:
            status = path.stat()
        except OSError as failure:
            raise storage_error(path, failure) from None
        entry = _Range(path, offset, length, status.st_mtime_ns, status.st_size)
        with self._lock:
            self._ranges[digest] = entry

    def unregister(self, path: Path) -> None:
        """Serve no range of a file, or of one in a folder, any more."""
        with self._lock:
            self._ranges = {
                digest: found
                for digest, found in self._ranges.items()
                if not found.path.is_relative_to(path)
            }

    def put_bytes(self, data: bytes) -> Digest:
        """Store bytes; gives their digest."""
        digest = digest_of(data)
        if not self.path(digest).exists():
            write_atomically(self.path(digest), data)
        return digest

    def put_file(self, path: Path, *, passing: bool = False) -> Digest:
        """Move a file into the store; gives its digest. The file stays where it is on failure."""
        try:
            digest = hash_range(path, 0, path.stat().st_size)
            target = self.path(digest, passing=passing)
            try:
                _adopt(path, target)
            except OSError as failure:
                if failure.errno != errno.EXDEV:
                    raise
                self._copy(path, target)
                path.unlink()
        except OSError as failure:
            raise storage_error(path, failure) from None
        return digest

    def remove(self, digest: Digest) -> None:
        """Forget a blob that has a file of its own, or of which a part has come in passing."""
        self.part_path(digest, passing=True).unlink(missing_ok=True)
        for passing in (False, True):
            self.path(digest, passing=passing).unlink(missing_ok=True)

    def finish(self, digest: Digest, *, passing: bool = False) -> Path:
        """Verify a complete `.part` file and give it its name; `CorruptFileError` removes it."""
        part, path = self.part_path(digest, passing=passing), self.path(digest, passing=passing)
        try:
            if hash_range(part, 0, part.stat().st_size) != digest:
                part.unlink()
                raise CorruptFileError(
                    f"a received blob is not what was promised ({digest[:12]})", "try again"
                )
            _adopt(part, path)
        except OSError as failure:
            raise storage_error(part, failure) from None
        return path

    def _copy(self, path: Path, target: Path) -> None:
        """Take in a file of another file system, which cannot be renamed into this one."""
        temporary = self._blobs / f".{secrets.token_hex(8)}.tmp"
        try:
            shutil.copyfile(path, temporary)
            if hash_range(temporary, 0, temporary.stat().st_size) != target.name:
                raise CorruptFileError(f"{path} changed while it was stored", "try again")
            _adopt(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _adopt(file: Path, path: Path) -> None:
    """Give a hashed file its name in the store, once its bytes are on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.replace(path)
    sync_folder(path.parent)


def hash_range(path: Path, offset: int, length: int) -> Digest:
    """SHA-256 of a range of a file; `CorruptFileError` if the file is shorter."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(offset)
            left = length
            while left:
                data = file.read(min(left, READ_BYTES))
                if not data:
                    raise CorruptFileError(f"{path} is shorter than its header says")
                digest.update(data)
                left -= len(data)
    except OSError as failure:
        raise storage_error(path, failure) from None
    return Digest(digest.hexdigest())


def _unchanged(entry: _Range) -> bool:
    try:
        status = entry.path.stat()
    except OSError:
        return False
    return (status.st_mtime_ns, status.st_size) == (entry.modified_ns, entry.size)
