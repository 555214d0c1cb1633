"""States on a device's disk go when nobody needs them, and not before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from confidantd.ids import Digest
from confidantd.jobs.passing_states import PassingStates
from confidantd.store.blobs import BlobStore


class Disk:
    """A store with one state in it, which stages here have `written` or not."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder / "store")
        file = folder / "after-7-0.state"
        file.write_bytes(b"weights and moments")
        self.state = self.store.put_file(file, passing=True)
        self.written: set[Digest] = set()
        self.states = PassingStates(self.store, lambda: self.written)

    def there(self) -> bool:
        return self.store.check(self.state) is not None


async def test_a_state_that_an_ended_stage_drops_stays_for_one_that_begins(tmp_path: Path) -> None:
    """The next epoch begins on a device with what the last one wrote there."""
    disk = await asyncio.to_thread(Disk, tmp_path)
    async with disk.states.reading({disk.state}), disk.states.reading({disk.state}):
        await disk.states.drop({disk.state})
        assert await asyncio.to_thread(disk.there)
    assert not await asyncio.to_thread(disk.there), "it would outlive the job"
    await disk.states.close()


async def test_a_state_that_a_stage_has_written_stays(tmp_path: Path) -> None:
    disk = await asyncio.to_thread(Disk, tmp_path)
    disk.written = {disk.state}
    async with disk.states.reading({disk.state}):
        pass
    assert await asyncio.to_thread(disk.there)
    disk.written = set()
    await disk.states.drop({disk.state})
    assert not await asyncio.to_thread(disk.there)
    await disk.states.close()


@pytest.mark.parametrize("turns", range(4))
async def test_what_a_stage_finds_when_it_begins_stays(tmp_path: Path, turns: int) -> None:
    """Or it is gone already, and fetched; never does it go after it was found."""
    disk = await asyncio.to_thread(Disk, tmp_path)
    dropping = asyncio.create_task(disk.states.drop({disk.state}))
    for _ in range(turns):
        await asyncio.sleep(0)
    async with disk.states.reading({disk.state}):
        found = await asyncio.to_thread(disk.there)
        await dropping
        assert await asyncio.to_thread(disk.there) == found
    await disk.states.close()


async def test_a_drop_whose_caller_goes_is_done_all_the_same(tmp_path: Path) -> None:
    disk = await asyncio.to_thread(Disk, tmp_path)
    dropping = asyncio.create_task(disk.states.drop({disk.state}))
    await asyncio.sleep(0)
    dropping.cancel()
    await disk.states.close()
    assert not await asyncio.to_thread(disk.there)
