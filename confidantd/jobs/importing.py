"""Models that are one GGUF file: each gets a folder in the daemon's home, without its weights."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from confidantd.errors import ConfidantError, ModelError
from confidantd.ids import digest_of
from confidantd.jobs.options import GenerateOptions, PlanOptions, ServeOptions, TrainOptions
from confidantd.jobs.record import JobLog
from confidantd.jobs.subprocesses import run_module
from confidantd.models.folder import read_model
from confidantd.models.imported import identity, is_file_model
from confidantd.store.files import storage_error

_log = logging.getLogger(__name__)
_Options = TypeVar("_Options", PlanOptions, TrainOptions, GenerateOptions, ServeOptions)

VERSION = 1  # raise it whenever another folder would come of the same file
MAX_REMEMBERED = 32  # folders; one takes some megabytes


class Importer:
    """Makes and remembers the folders."""

    def __init__(self, home: Path) -> None:
        self._folder, self._logs = home / "imported", home / "logs"
        self._one_at_a_time = asyncio.Lock()

    async def with_folder(self, options: _Options, log: JobLog | None = None) -> _Options:
        """The options with the folder of a model that is one file, which is read once; `log` is
        told where that takes a while.
        """
        if not await asyncio.to_thread(is_file_model, options.model):
            return options
        return replace(options, model=str(await self._folder_of(Path(options.model), log)))

    async def _folder_of(self, file: Path, log: JobLog | None) -> Path:
        target = self._folder / await asyncio.to_thread(_key, file)
        async with self._one_at_a_time:
            if not await asyncio.to_thread(_is_whole, target):
                if log is not None:
                    log.emit({"event": "progress", "phase": "import", "done": 0, "of": 1,
                              "detail": file.name})  # fmt: skip
                await self._make(file, target)
        return target

    async def _make(self, file: Path, target: Path) -> None:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            await asyncio.to_thread(self._begin, partial)
            await run_module(
                "confidantd.jobs.gguf_import",
                [str(file), str(partial)],
                self._logs / "import.log",
                lambda _: None,
                ModelError,
            )
            await asyncio.to_thread(_replace, partial, target)
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True))

    def _begin(self, partial: Path) -> None:
        """A new folder; the oldest ones make room for it, and those that never were finished."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            others = sorted(self._folder.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
            whole = [path for path in others if not path.name.startswith(".")]
            for folder in {*others} - {*whole[: MAX_REMEMBERED - 1]}:
                shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
        except OSError as failure:
            raise storage_error(partial, failure) from None


def _key(file: Path) -> str:
    return digest_of(json.dumps([VERSION, identity(file)]).encode())[:32]


def _is_whole(folder: Path) -> bool:
    """Whether a folder from before can be used; where not, it is made again."""
    if not folder.is_dir():
        return False
    try:
        read_model(folder)
    except ConfidantError as failure:
        _log.warning("%s is made again: %s", folder, failure)
        return False
    return True


def _replace(partial: Path, target: Path) -> None:
    try:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as failure:
        raise storage_error(target, failure) from None
