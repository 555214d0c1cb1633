"""Digests of a model's tensors, taken once, so that peers can fetch and verify each of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from confidantd.errors import StorageError
from confidantd.ids import Digest, is_digest
from confidantd.models.safetensors import TensorLocation
from confidantd.store.blobs import BlobStore, hash_range
from confidantd.store.files import storage_error, write_atomically
from confidantd.wire.stage import TensorEntry

_log = logging.getLogger(__name__)

MAX_REMEMBERED = 100_000  # digests; a 70B model has about 700 tensors


class ModelIndex:
    """Hashes tensors where they lie and registers them as blobs. Blocking."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._file = store.root / "index.json"
        self._digests = self._read()

    def entries(
        self, locations: Mapping[str, TensorLocation], names: tuple[str, ...]
    ) -> tuple[TensorEntry, ...]:
        """The named tensors with their digests, all of them served by the store afterwards."""
        known = len(self._digests)
        entries = tuple(self._entry(name, locations[name]) for name in names)
        if len(self._digests) != known:
            self._write()
        return entries

    def _entry(self, name: str, location: TensorLocation) -> TensorEntry:
        digest = self._digest(location)
        self._store.register(digest, location.file, location.offset, location.bytes)
        return TensorEntry(
            name=name,
            dtype=location.dtype,
            shape=tuple(location.shape),
            bytes=location.bytes,
            digest=digest,
        )

    def _digest(self, location: TensorLocation) -> Digest:
        key = _key(location)
        found = self._digests.get(key)
        if found is None:
            found = hash_range(location.file, location.offset, location.bytes)
            self._digests[key] = found
        return found

    def _read(self) -> dict[str, Digest]:
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}  # not there yet, or unreadable: everything is hashed again
        if not isinstance(found, dict):
            return {}
        return {str(k): Digest(v) for k, v in found.items() if is_digest(str(v))}

    def _write(self) -> None:
        """Keep the newest digests; without them the next job only hashes again."""
        newest = dict(list(self._digests.items())[-MAX_REMEMBERED:])
        try:
            write_atomically(self._file, json.dumps(newest).encode())
        except StorageError as failure:
            _log.warning("tensor digests are not remembered: %s", failure)


def _key(location: TensorLocation) -> str:
    """Names the bytes of a range: changes when the file is written or replaced."""
    try:
        status = location.file.stat()
    except OSError as failure:
        raise storage_error(location.file, failure) from None
    place = (status.st_ino, status.st_mtime_ns, status.st_size, location.offset, location.bytes)
    return ":".join(str(part) for part in (location.file.resolve(), *place))
