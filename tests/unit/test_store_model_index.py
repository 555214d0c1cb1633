"""Digests of tensors: taken once, remembered over restarts, taken again when a file changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from confidantd.errors import StorageError
from confidantd.ids import digest_of
from confidantd.models.safetensors import Piece, TensorLocation, read_header, write_file
from confidantd.store.blobs import BlobStore
from confidantd.store.model_index import ModelIndex

NAMES = ("a", "b")


def write(path: Path, first: bytes) -> dict[str, TensorLocation]:
    """A checkpoint of two tensors."""
    write_file(path, [Piece("a", "F32", (2,), first), Piece("b", "F32", (1,), b"bbbb")])
    return dict(read_header(path))


def index_of(root: Path) -> tuple[BlobStore, ModelIndex]:
    store = BlobStore(root)
    return store, ModelIndex(store)


def test_tensors_are_served_where_they_lie(tmp_path: Path) -> None:
    locations = write(tmp_path / "m.safetensors", b"aaaaaaaa")
    store, index = index_of(tmp_path / "store")
    first, second = index.entries(locations, NAMES)
    assert (first.name, first.dtype, first.shape, first.bytes) == ("a", "F32", (2,), 8)
    assert first.digest == digest_of(b"aaaaaaaa")
    assert second.digest == digest_of(b"bbbb")
    location = locations["a"]
    assert store.locate(first.digest) == (location.file, location.offset, 8)
    assert list((tmp_path / "store" / "blobs").iterdir()) == []


def test_digests_are_remembered(tmp_path: Path) -> None:
    locations = write(tmp_path / "m.safetensors", b"aaaaaaaa")
    wanted = index_of(tmp_path / "store")[1].entries(locations, NAMES)
    file = locations["a"].file
    status = file.stat()
    damaged = bytearray(file.read_bytes())
    damaged[locations["a"].offset] ^= 1
    file.write_bytes(damaged)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert index_of(tmp_path / "store")[1].entries(locations, NAMES) == wanted  # not read again


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    locations = write(path, b"aaaaaaaa")
    store, index = index_of(tmp_path / "store")
    old = index.entries(locations, NAMES)[0].digest
    path.unlink()
    new = index.entries(write(path, b"AAAAAAAA"), NAMES)[0].digest
    assert new == digest_of(b"AAAAAAAA")
    assert store.locate(old) is None


@pytest.mark.parametrize("junk", [b"", b"[1]", b"\xff", b'{"key": "no digest"}'])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, junk: bytes) -> None:
    locations = write(tmp_path / "m.safetensors", b"aaaaaaaa")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.json").write_bytes(junk)
    index = index_of(tmp_path / "store")[1]
    assert index.entries(locations, ("b",))[0].digest == digest_of(b"bbbb")


def test_a_model_that_was_deleted_meanwhile(tmp_path: Path) -> None:
    locations = write(tmp_path / "m.safetensors", b"aaaaaaaa")
    locations["a"].file.unlink()
    with pytest.raises(StorageError, match="No such file"):
        index_of(tmp_path / "store")[1].entries(locations, NAMES)
