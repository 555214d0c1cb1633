"""Checkpoints on the owner's disk: whole or not there, found again, and served to others."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest

from confidantd.errors import StorageError
from confidantd.ids import DeviceId
from confidantd.jobs.checkpoints import FOLDER, KEPT, STATE_NAME, Checkpoint, Checkpoints
from confidantd.jobs.replication import Pace
from confidantd.store.blobs import BlobStore
from confidantd.wire.stage import StateEntry
from tests.full_disk import limited_files

ME, OTHER = DeviceId("a" * 64), DeviceId("b" * 64)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """The owner's."""
    return BlobStore(tmp_path / "store")


@pytest.fixture
def checkpoints(tmp_path: Path, store: BlobStore) -> Checkpoints:
    """Of one job."""
    return Checkpoints(tmp_path / "job", store, ME)


def entries(store: BlobStore, steps: int) -> dict[str, StateEntry]:
    """Two tensors in one blob and one in another, which lie in the store."""
    one, two = (store.put_bytes(bytes([steps, part]) * 18) for part in (1, 2))
    return {
        "w": StateEntry("w", 1, 36, one, OTHER, 0),
        "v": StateEntry("v", 2, 36, one, OTHER, 12),
        "u": StateEntry("u", 3, 36, two, OTHER, 0),
    }


def write(checkpoints: Checkpoints, store: BlobStore, steps: int) -> Checkpoint:
    """One more; the store forgets its part, as after a fetch."""
    found = checkpoints.write(steps, entries(store, steps), {"data": "text"})
    for digest in found.blobs:
        store.remove(digest)
    return found


def places(tmp_path: Path) -> list[str]:
    """Folders of checkpoints."""
    return sorted(path.name for path in (tmp_path / "job" / FOLDER).iterdir())


def content(store: BlobStore, entry: StateEntry) -> bytes:
    """The bytes of a tensor, as another device would be served."""
    found = store.locate(entry.digest)
    assert found is not None
    path, offset, _ = found
    start = offset + entry.offset
    return path.read_bytes()[start : start + 12 * entry.size]


def test_the_newest_is_found_again_and_served_by_this_device(
    checkpoints: Checkpoints, store: BlobStore, tmp_path: Path
) -> None:
    assert checkpoints.newest() is None
    for steps in (3, 5, 8):
        write(checkpoints, store, steps)
    assert places(tmp_path) == ["00000005", "00000008"]
    assert len(places(tmp_path)) == KEPT
    again = BlobStore(tmp_path / "store")
    found = Checkpoints(tmp_path / "job", again, ME).newest()
    assert found is not None
    assert found.steps == 8
    assert {entry.source for entry in found.entries.values()} == {ME}
    assert content(again, found.entries["v"]) == bytes([8, 1]) * 12
    assert content(again, found.entries["u"]) == bytes([8, 2]) * 18
    assert Checkpoints(tmp_path / "job", again, ME).facts(found)["data"] == "text"


def flip(path: Path) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    """Half of it is missing."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, cut_off, Path.unlink])
@pytest.mark.parametrize("what", ["blob", STATE_NAME])
def test_a_damaged_one_is_passed_over(
    checkpoints: Checkpoints, store: BlobStore, tmp_path: Path, harm: object, what: str
) -> None:
    write(checkpoints, store, 3)
    last = write(checkpoints, store, 5)
    name = last.entries["u"].digest if what == "blob" else STATE_NAME
    assert callable(harm)
    harm(tmp_path / "job" / FOLDER / "00000005" / name)
    found = Checkpoints(tmp_path / "job", store, ME).newest()
    assert found is not None
    assert found.steps == 3


def test_a_full_disk_leaves_the_last_one(
    checkpoints: Checkpoints, store: BlobStore, tmp_path: Path
) -> None:
    before = write(checkpoints, store, 3)
    more = entries(store, 5)
    with limited_files(100), pytest.raises(StorageError, match="the disk is full"):
        checkpoints.write(5, more, {})
    assert places(tmp_path) == ["00000003"]
    assert checkpoints.newest() == before


def test_without_hard_links_the_bytes_are_copied(
    checkpoints: Checkpoints, store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Path, _target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    found = write(checkpoints, store, 4)
    assert checkpoints.newest() == found


def test_a_blob_that_is_gone_makes_no_checkpoint(
    checkpoints: Checkpoints, store: BlobStore, tmp_path: Path
) -> None:
    gone: Mapping[str, StateEntry] = entries(store, 5)
    store.remove(gone["u"].digest)
    with pytest.raises(StorageError, match="gone"):
        checkpoints.write(5, gone, {})
    assert places(tmp_path) == []


def test_steps_that_are_done_again_replace_the_later_ones(
    checkpoints: Checkpoints, store: BlobStore, tmp_path: Path
) -> None:
    for steps in (3, 5, 4):
        write(checkpoints, store, steps)
    assert places(tmp_path) == ["00000003", "00000004"]
    checkpoints.remove()
    assert checkpoints.newest() is None


def test_snapshots_take_no_more_than_their_share() -> None:
    pace = Pace(0.1)
    assert pace.due(100.0)
    pace.took(100.0, 102.0)
    assert not pace.due(119.9)
    assert pace.due(120.0)
