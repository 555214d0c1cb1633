"""The blob store: names follow bytes, ranges of files are blobs, nothing half-written shows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from confidantd.errors import CorruptFileError, StorageError
from confidantd.ids import digest_of
from confidantd.store.blobs import BlobStore, hash_range
from tests.full_disk import limited_files


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store")


def blob_files(store: BlobStore) -> list[str]:
    return sorted(path.name for path in (store.root / "blobs").iterdir())


def test_bytes_are_found_under_their_digest(store: BlobStore) -> None:
    digest = store.put_bytes(b"hello")
    assert digest == digest_of(b"hello")
    assert store.locate(digest) == (store.path(digest), 0, 5)
    assert store.put_bytes(b"hello") == digest
    store.remove(digest)
    store.remove(digest)
    assert store.locate(digest) is None


def test_a_file_is_moved_in(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"w" * 3_000_000)
    digest = store.put_file(source)
    assert digest == digest_of(b"w" * 3_000_000)
    assert store.path(digest).stat().st_size == 3_000_000
    assert not source.exists()


def test_a_file_of_another_file_system_is_copied_and_removed(store: BlobStore) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == store.root.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    source = other / f"confidant-test-{os.getpid()}"
    source.write_bytes(b"over there")
    try:
        with limited_files(5), pytest.raises(StorageError, match="disk is full"):
            store.put_file(source)
        assert source.read_bytes() == b"over there"
        assert blob_files(store) == []
        digest = store.put_file(source)
        assert not source.exists()
    finally:
        source.unlink(missing_ok=True)
    assert store.path(digest).read_bytes() == b"over there"
    assert blob_files(store) == [digest]


def test_a_file_that_is_not_there(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        store.put_file(tmp_path / "none")
    with pytest.raises(StorageError, match="No such file"):
        store.register(digest_of(b""), tmp_path / "none", 0, 1)


def test_a_range_of_a_file_is_a_blob_until_the_file_changes(
    store: BlobStore, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"headTENSORtail")
    digest = hash_range(file, 4, 6)
    assert digest == digest_of(b"TENSOR")
    store.register(digest, file, 4, 6)
    assert store.locate(digest) == (file, 4, 6)
    os.utime(file, ns=(1, 1))
    assert store.locate(digest) is None
    store.register(digest, file, 4, 6)
    file.unlink()
    assert store.locate(digest) is None


def test_a_range_beyond_the_end_is_corrupt(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match="shorter"):
        hash_range(file, 1, 3)


def test_a_part_gets_its_name_only_with_the_right_bytes(store: BlobStore) -> None:
    digest = digest_of(b"right")
    store.part_path(digest).write_bytes(b"wrong")
    with pytest.raises(CorruptFileError, match="not what was promised"):
        store.finish(digest)
    assert blob_files(store) == []
    store.part_path(digest).write_bytes(b"right")
    assert store.finish(digest).read_bytes() == b"right"
    with pytest.raises(StorageError):
        store.finish(digest)


def test_a_full_disk_stores_nothing(store: BlobStore) -> None:
    with limited_files(1000), pytest.raises(StorageError, match="the disk is full"):
        store.put_bytes(bytes(5000))
    assert blob_files(store) == []


def test_a_full_file_system(tmp_path: Path) -> None:
    """The same on a real one, where this user may mount it."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        small = BlobStore(mounted)
        kept = small.put_bytes(b"kept")
        with pytest.raises(StorageError, match="the disk is full"):
            small.put_bytes(bytes(200_000))
        assert blob_files(small) == [kept]
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        BlobStore(tmp_path / "file")


def test_what_passes_is_gone_after_a_restart(store: BlobStore, tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"of a job")
    digest = store.put_file(file, passing=True)
    kept = store.put_bytes(b"kept")
    found = store.locate(digest)
    assert found is not None
    assert found[0].read_bytes() == b"of a job"
    assert blob_files(store) == [kept]
    again = BlobStore(store.root)
    assert again.locate(digest) == found, "another process of the same daemon takes nothing away"
    again.forget_passing()
    assert again.locate(digest) is None
    assert again.locate(kept) is not None


def test_a_damaged_blob_is_noticed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "store")
    digest = store.put_bytes(b"weights of a block")
    assert store.check(digest) == (store.path(digest), 0, 18)
    store.path(digest).write_bytes(b"weights of a blokk")
    assert store.check(digest) is None
    assert not store.path(digest).exists(), "it can be fetched again"


def test_a_damaged_range_of_another_file_is_an_error(tmp_path: Path) -> None:
    store, file = BlobStore(tmp_path / "store"), tmp_path / "model.safetensors"
    file.write_bytes(b"head weights tail")
    status, digest = file.stat(), digest_of(b"weights")
    store.register(digest, file, 5, 7)
    assert store.check(digest) == (file, 5, 7)
    file.write_bytes(b"head w3ights tail")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptFileError, match="has changed on the disk"):
        store.check(digest)
    assert file.exists()
