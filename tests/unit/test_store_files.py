"""Files are written whole or not at all, and errors of the disk are told clearly."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from confidantd.errors import StorageError
from confidantd.store.files import storage_error, write_atomically
from tests.full_disk import limited_files


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"one")
    write_atomically(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    with limited_files(1000), pytest.raises(StorageError, match="the disk is full"):
        write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/state cannot be used \(No such file"):
        write_atomically(tmp_path / "nowhere" / "state", b"")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "is full"), (errno.EROFS, "may not be written"), (errno.EIO, "cannot be used")],
)
def test_what_the_user_reads(number: int, words: str) -> None:
    failure = storage_error(Path("/x"), OSError(number, "reason"))
    assert words in failure.message
    assert failure.hint
