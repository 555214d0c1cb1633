"""What the stages of a job keep on this device while they run, in the job's folder."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from confidantd.ids import JobId
from confidantd.jobs.grants import TRAINED, Held

_log = logging.getLogger(__name__)

TURNS = "turns"  # the file that the stages of one job on this device lock


class StageFiles:
    """Below `jobs/` of a device's home, where its own jobs keep their records, too. Blocking."""

    def __init__(self, home: Path) -> None:
        self._jobs = home / "jobs"

    def turns(self, job: JobId) -> Path:
        """The file that the job's stages lock."""
        return self._jobs / job / TURNS

    def trained(self, held: Held) -> Path:
        """The folder of what a stage has trained."""
        return self._jobs / held.offer.job / held.folder

    def remove(self, held: Held, *, last: bool) -> None:
        """What a stage has written; with the job's `last` stage here also what all of them share.

        The owner's record of the job stays.
        """
        trained = self.trained(held)
        with contextlib.suppress(OSError):
            for path in trained.iterdir():
                path.unlink()
            trained.rmdir()
        if last:
            with contextlib.suppress(OSError):
                (trained.parent / TURNS).unlink(missing_ok=True)
                trained.parent.rmdir()

    def forget(self) -> None:
        """All of it: no stage runs, but a daemon that was killed could not clean up."""
        for path in [*self._jobs.glob(f"*/{TRAINED}*"), *self._jobs.glob(f"*/{TURNS}")]:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                with contextlib.suppress(OSError):  # it is a job of this device's
                    path.parent.rmdir()
            except OSError as failure:
                _log.warning("%s cannot be removed: %s", path, failure)
