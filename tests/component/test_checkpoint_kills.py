"""A process that writes checkpoints and is killed at any moment: the last one is always whole."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from confidantd.ids import DeviceId
from confidantd.jobs.checkpoints import Checkpoints
from confidantd.store.blobs import BlobStore
from confidantd.wire.stage import StateEntry

KILLS = 12
BLOBS, BLOB_BYTES = 4, 120_000
ME = DeviceId("a" * 64)


def content(steps: int, part: int) -> bytes:
    """What a part of the state is after so many steps."""
    return f"{steps} {part} ".encode() * (BLOB_BYTES // len(f"{steps} {part} "))


def write_for_ever(folder: Path) -> None:
    """In the process that is killed: go on from the last checkpoint; say each that is written."""
    store = BlobStore(folder / "store")
    checkpoints = Checkpoints(folder / "job", store, ME)
    newest = checkpoints.newest()
    steps = 0 if newest is None else newest.steps
    while True:
        steps += 1
        entries = {}
        for part in range(BLOBS):
            data = content(steps, part)
            digest = store.put_bytes(data)
            entries[str(part)] = StateEntry(str(part), len(data) // 12, len(data), digest, ME)
        found = checkpoints.write(steps, entries, {"loss": 1 / steps})
        for digest in found.blobs:
            store.remove(digest)
        print(steps, flush=True)


def test_every_restart_finds_the_last_one(tmp_path: Path) -> None:
    chance = random.Random(11)
    written = 0
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-m", __name__, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            written = int(process.stdout.readline())
            for _ in range(chance.randrange(20)):
                written = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split()
        written = int(rest[-1]) if rest else written
        store = BlobStore(tmp_path / "store")
        checkpoints = Checkpoints(tmp_path / "job", store, ME)
        found = checkpoints.newest()
        assert found is not None
        assert found.steps in (written, written + 1)  # it may not have come to saying so
        assert checkpoints.facts(found)["loss"] == 1 / found.steps
        for name, entry in found.entries.items():
            place = store.locate(entry.digest)
            assert place is not None
            assert place[0].read_bytes() == content(found.steps, int(name))
        assert len(list((tmp_path / "job" / "checkpoints").iterdir())) <= 4, "rests are left"
    assert written > KILLS


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))
