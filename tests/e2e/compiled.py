"""What one daemon of a test compiled lies in the next one's store, as after an earlier job, and
what it measured of such blocks, and of the device, beside it.

The first test that needs something compiles or measures it, for real; others would only wait.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from confidantd.ids import digest_of
from tests.programs import folder

PROFILE = "profile.json"


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


def lend_profile(home: Path, kind: str) -> None:
    """Give a home that was never used what a daemon of this kind measured of its device; where
    the kind does not tell all, the daemon sees that it is another's and measures again.
    """
    profile = folder() / "profiles" / f"{digest_of(kind.encode())}.json"
    if profile.exists() and not (home / PROFILE).exists():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(profile, home / PROFILE)


def keep_profile(home: Path, kind: str) -> None:
    """Remember what a daemon of this kind measured."""
    if (home / PROFILE).exists():
        _copy(home / PROFILE, folder() / "profiles" / f"{digest_of(kind.encode())}.json")


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
