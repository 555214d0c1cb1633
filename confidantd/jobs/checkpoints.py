"""Checkpoints of a training job on its owner's disk: written whole or not at all, verified, the
last ones kept.

A checkpoint is a folder named by its steps: blobs of weights and moments, each named by its
SHA-256, and `state.json`, which says where in them each tensor is. It does not depend on how
the model was split: any plan can go on from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confidantd.errors import ConfidantError, CorruptFileError, StorageError
from confidantd.ids import DeviceId, Digest, digest_of
from confidantd.store.blobs import BlobStore, hash_range
from confidantd.store.files import storage_error, sync_folder, write_atomically
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.stage import StateEntry

_log = logging.getLogger(__name__)

FOLDER, STATE_NAME, FORMAT = "checkpoints", "state.json", 1
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The trained tensors of a job after `steps` steps, each with its moments, by name."""

    steps: int
    entries: Mapping[str, StateEntry]

    @property
    def blobs(self) -> dict[Digest, int]:
        """Sizes of its files in bytes."""
        return {entry.digest: entry.bytes for entry in self.entries.values()}


class Checkpoints:
    """Those of one job, in `folder`; `source` is this device, which serves them. Blocking."""

    def __init__(self, folder: Path, store: BlobStore, source: DeviceId) -> None:
        self._folder = folder / FOLDER
        self._store = store
        self._source = source

    def write(self, steps: int, entries: Mapping[str, StateEntry], facts: Mapping[str, Any]) -> (
        Checkpoint
    ):  # fmt: skip
        """Keep what lies in the store as a checkpoint; older ones than the last go.

        `facts` come along, for people and for `facts`. StorageError leaves the others as they are.
        """
        found = Checkpoint(
            steps, {name: replace(entry, source=self._source) for name, entry in entries.items()}
        )
        place = self._folder / f"{steps:08d}"
        new = self._folder / f".{place.name}.new"
        tensors = [to_map(entry) for entry in found.entries.values()]
        state = {"format": FORMAT, "steps": steps, **facts, "tensors": tensors}
        text = json.dumps({"sha256": _digest(state), "state": state}, separators=(",", ":"))
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            for digest in found.blobs:
                self._take(digest, new / digest)
            write_atomically(new / STATE_NAME, text.encode())
            sync_folder(new)
            shutil.rmtree(place, ignore_errors=True)  # of the same step, before the job went back
            new.rename(place)
            sync_folder(self._folder)
        except OSError as failure:
            raise storage_error(place, failure) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
        self._serve(found)
        self._forget(steps)
        return found

    def newest(self) -> Checkpoint | None:
        """The last one that is whole; None if there is none. Its blobs are served from now on."""
        for place in reversed(self._places()):
            try:
                found = self._read(place)
            except ConfidantError as failure:
                _log.warning("the checkpoint %s is not used: %s", place, failure)
                continue
            self._serve(found)
            return found
        return None

    def facts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What was written with it."""
        return _state(self._state_file(checkpoint.steps))

    def remove(self) -> None:
        """All of them: the job is done."""
        self._store.unregister(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _state_file(self, steps: int) -> Path:
        return self._folder / f"{steps:08d}" / STATE_NAME

    def _places(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("[0-9]*") if path.name.isdecimal())

    def _read(self, place: Path) -> Checkpoint:
        """CorruptFileError unless every byte is as it was."""
        state = _state(place / STATE_NAME)
        if state.get("format") != FORMAT:
            raise CorruptFileError(f"its format is {state.get('format')}")
        entries = [from_map(StateEntry, tensor) for tensor in state["tensors"]]
        found = Checkpoint(
            int(state["steps"]), {e.name: replace(e, source=self._source) for e in entries}
        )
        for digest, size_bytes in found.blobs.items():
            self._verify(place / digest, digest, size_bytes)
        return found

    def _verify(self, path: Path, digest: Digest, size_bytes: int) -> None:
        if not path.is_file() or path.stat().st_size != size_bytes:
            raise CorruptFileError(f"{path.name[:12]} is missing or cut off")
        if hash_range(path, 0, size_bytes) != digest:
            raise CorruptFileError(f"{path.name[:12]} has changed")

    def _take(self, digest: Digest, target: Path) -> None:
        """The same bytes under another name; a copy where the file system has no links."""
        found = self._store.locate(digest)
        if found is None:
            raise StorageError(f"the blob {digest[:12]} is gone from the store", "try again")
        path, offset, length = found
        if offset == 0 and path.stat().st_size == length:
            try:
                target.hardlink_to(path)
                return
            except OSError:  # Android's shared storage, FAT
                shutil.copyfile(path, target)
                with target.open("rb") as copied:
                    os.fsync(copied.fileno())
                return
        raise StorageError(f"the blob {digest[:12]} has no file of its own")

    def _serve(self, checkpoint: Checkpoint) -> None:
        place = self._state_file(checkpoint.steps).parent
        for digest, size_bytes in checkpoint.blobs.items():
            self._store.register(digest, place / digest, 0, size_bytes)

    def _forget(self, steps: int) -> None:
        """Older ones than the last, and later ones: the job has gone back since."""
        places = self._places()
        later = [place for place in places if int(place.name) > steps]
        for place in [*later, *[p for p in places if p not in later][:-KEPT]]:
            self._store.unregister(place)
            with contextlib.suppress(OSError):
                shutil.rmtree(place)


def _state(path: Path) -> dict[str, Any]:
    """What was written, or CorruptFileError."""
    try:
        read = json.loads(path.read_text())
        state: dict[str, Any] = read["state"]
        if read["sha256"] != _digest(state):
            raise CorruptFileError(f"its {STATE_NAME} has changed")
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise CorruptFileError(f"its {STATE_NAME} cannot be read ({failure})") from None
    return state


def _digest(state: Mapping[str, Any]) -> Digest:
    return digest_of(json.dumps(state, sort_keys=True).encode())
