"""Quantised matrices of a model: made once on the device that owns it, then kept by content."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from confidantd.errors import ModelError
from confidantd.ids import Digest, digest_of, is_digest
from confidantd.jobs.subprocesses import run_module
from confidantd.models.quantisation import QuantisedMatrix
from confidantd.models.safetensors import TensorLocation
from confidantd.store.blobs import BlobStore
from confidantd.store.files import storage_error, write_atomically
from confidantd.wire.stage import TensorEntry

VERSION = 1  # raise it whenever other numbers would come of the same weights
QUESTION = "question.json"
Progress = Callable[[str, int, int], None]


class Quantiser:
    """Makes and remembers them."""

    def __init__(self, store: BlobStore, home: Path) -> None:
        self._store = store
        self._home = home
        self._one_at_a_time = asyncio.Lock()
        self._whole: dict[Digest, tuple[int, int]] = {}  # hashed by this daemon: time and size

    async def entries(
        self,
        matrices: Sequence[QuantisedMatrix],
        sources: Mapping[str, TensorEntry],
        locations: Mapping[str, TensorLocation],
        progress: Progress,
    ) -> dict[str, TensorEntry]:
        """An entry for each matrix by its name, all in the local store afterwards."""
        keys = {m.name: _key(m, sources[m.stored]) for m in matrices}
        async with self._one_at_a_time:
            found = await asyncio.to_thread(self._known, matrices, keys)
            missing = [m for m in matrices if m.name not in found]
            if missing:
                found |= await self._make(missing, keys, locations, progress)
        return found

    def _known(
        self, matrices: Sequence[QuantisedMatrix], keys: Mapping[str, Digest]
    ) -> dict[str, TensorEntry]:
        """Those that were made before, and are still there and whole."""
        found = {}
        for matrix in matrices:
            try:
                text = json.loads(self._index(keys[matrix.name]).read_text())["digest"]
                if is_digest(text) and self._is_whole(Digest(text)):
                    found[matrix.name] = _entry(matrix, Digest(text))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is made again
        return found

    def _is_whole(self, digest: Digest) -> bool:
        """Each is hashed once in a daemon's life, unless its file has changed."""
        place = self._store.locate(digest)
        if place is None:
            return False
        status = place[0].stat()
        if self._whole.get(digest) != (status.st_mtime_ns, status.st_size):
            if self._store.check(digest) is None:
                return False
            self._whole[digest] = (status.st_mtime_ns, status.st_size)
        return True

    async def _make(
        self,
        matrices: Sequence[QuantisedMatrix],
        keys: Mapping[str, Digest],
        locations: Mapping[str, TensorLocation],
        progress: Progress,
    ) -> dict[str, TensorEntry]:
        """Quantise them; those that are ready stay, also where it is cut short."""
        folder, done = self._home / "quantising", 0

        def heard(line: dict[str, Any]) -> None:
            nonlocal done
            done = int(line["done"])
            progress(str(line["progress"]), done, int(line["of"]))

        asked = [_asked(matrix, locations[matrix.stored]) for matrix in matrices]
        await asyncio.to_thread(_ask, folder, asked)
        try:
            await run_module(
                "confidantd.worker.quantise",
                [str(folder / QUESTION), str(folder)],
                self._home / "logs" / "quantise.log",
                heard,
                ModelError,
            )
        finally:
            adopting = asyncio.to_thread(self._adopt, matrices[:done], keys, folder)
            found = await asyncio.shield(adopting)
        return found

    def _adopt(
        self, matrices: Sequence[QuantisedMatrix], keys: Mapping[str, Digest], folder: Path
    ) -> dict[str, TensorEntry]:
        found = {}
        for place, matrix in enumerate(matrices):
            digest = self._store.put_file(folder / str(place))
            index = self._index(keys[matrix.name])
            index.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(index, json.dumps({"digest": digest}).encode())
            found[matrix.name] = _entry(matrix, digest)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def _index(self, key: Digest) -> Path:
        return self._home / "store" / "quantised" / f"{key}.json"


def _ask(folder: Path, asked: list[dict[str, object]]) -> None:
    """Write the question into a new folder, in the place of what a daemon left that was killed."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / QUESTION).write_text(json.dumps(asked))
    except OSError as failure:
        raise storage_error(folder, failure) from None


def _key(matrix: QuantisedMatrix, source: TensorEntry) -> Digest:
    plain = [VERSION, source.digest, source.dtype, source.shape, matrix.transposed]
    return digest_of(json.dumps([*plain, matrix.format.name]).encode())


def _entry(matrix: QuantisedMatrix, digest: Digest) -> TensorEntry:
    form = matrix.format
    return TensorEntry(matrix.name, form.name, matrix.shape, form.size(matrix.shape), digest)


def _asked(matrix: QuantisedMatrix, location: TensorLocation) -> dict[str, object]:
    return {
        "name": matrix.name,
        "file": str(location.file),
        "offset": location.offset,
        "dtype": location.dtype,
        "shape": location.shape,
        "transposed": matrix.transposed,
        "format": matrix.format.name,
    }
