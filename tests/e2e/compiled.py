"""What one daemon of a test compiled lies in the next one's store, as after an earlier job, and
what it measured of such blocks beside it.

The first test that needs a shape compiles and measures it, for real; the others would only wait.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.programs import folder


def _kept() -> Path:
    return folder() / "store"


def lend(home: Path) -> None:
    """Give a home that was never used all programs that others have compiled."""
    if _kept().exists() and not (home / "store").exists():
        shutil.copytree(_kept(), home / "store")


def lend_speeds(home: Path) -> None:
    """Give a home that was never used the speeds of a device like it: files are named by shape,
    threads and backends.
    """
    speeds = folder() / "speeds"
    if speeds.exists() and not (home / "speeds").exists():
        shutil.copytree(speeds, home / "speeds")


def keep(home: Path) -> None:
    """Remember the programs in a home's store, and its speeds."""
    for file in (home / "speeds").glob("*.json"):
        _copy(file, folder() / "speeds" / file.name)
    for index in (home / "store" / "programs").glob("*.json"):
        digests = [entry["digest"] for entry in json.loads(index.read_text()).values()]
        files = [home / "store" / "blobs" / digest for digest in digests]
        if all(file.exists() for file in files):
            for file in (*files, index):  # the index last: then all it names are there
                _copy(file, _kept() / file.parent.name / file.name)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
