"""Quantised matrices of a model: made once on the device that owns it, then kept by content."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from confidantd.errors import ModelError
from confidantd.ids import Digest, digest_of
from confidantd.jobs.subprocesses import run_module
from confidantd.models.quantisation import QuantisedMatrix
from confidantd.models.safetensors import TensorLocation
from confidantd.store.blobs import BlobStore
from confidantd.store.files import write_atomically
from confidantd.wire.stage import TensorEntry

VERSION = 1  # raise it whenever other numbers would come of the same weights
Progress = Callable[[str, int, int], None]


class Quantiser:
    """Makes and remembers them."""

    def __init__(self, store: BlobStore, home: Path) -> None:
        self._store = store
        self._home = home
        self._one_at_a_time = asyncio.Lock()

    async def entries(
        self,
        matrices: Sequence[QuantisedMatrix],
        sources: Mapping[str, TensorEntry],
        locations: Mapping[str, TensorLocation],
        progress: Progress,
    ) -> dict[str, TensorEntry]:
        """An entry for each matrix by its name, all in the local store afterwards."""
        async with self._one_at_a_time:
            keys = {m.name: _key(m, sources[m.stored]) for m in matrices}
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
                digest = Digest(json.loads(self._index(keys[matrix.name]).read_text())["digest"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
            if self._store.check(digest):
                found[matrix.name] = _entry(matrix, digest)
        return found

    async def _make(
        self,
        matrices: Sequence[QuantisedMatrix],
        keys: Mapping[str, Digest],
        locations: Mapping[str, TensorLocation],
        progress: Progress,
    ) -> dict[str, TensorEntry]:
        with tempfile.TemporaryDirectory(prefix="quantise-", dir=self._home) as made:
            folder = Path(made)
            question = folder / "question.json"
            asked = [_asked(matrix, locations[matrix.stored]) for matrix in matrices]
            await asyncio.to_thread(question.write_text, json.dumps(asked))
            await run_module(
                "confidantd.worker.quantise",
                [str(question), str(folder)],
                self._home / "logs" / "quantise.log",
                lambda p: progress(str(p["progress"]), int(p["done"]), int(p["of"])),
                ModelError,
            )
            return await asyncio.to_thread(self._adopt, matrices, keys, folder)

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
        return found

    def _index(self, key: Digest) -> Path:
        return self._home / "store" / "quantised" / f"{key}.json"


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
