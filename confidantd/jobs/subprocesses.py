"""Heavy modules run in subprocesses that print JSON lines: progress, and perhaps an error."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from confidantd.errors import ConfidantError, from_wire
from confidantd.store.files import storage_error

MAX_LINE_BYTES = 1024 * 1024


async def run_module(
    module: str,
    arguments: list[str],
    log: Path,
    progress: Callable[[dict[str, Any]], None],
    failure: type[ConfidantError],
) -> None:
    """Run `python -m module arguments`; gives each `{"progress": ...}` line to `progress`.

    Raises the error the module printed, or `failure` with the last line of its
    standard error, which is kept in `log`. Cancelled: the subprocess is killed.
    """
    with await asyncio.to_thread(open_log, log) as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=MAX_LINE_BYTES,
        )
    try:
        error = await _read_lines(process, progress)
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    if error is not None:
        raise from_wire(error)
    if status != 0:
        line = await asyncio.to_thread(last_line, log)
        raise failure(f"{module} ended with status {status} ({line})", f"see {log}")


def open_log(log: Path) -> BinaryIO:
    """A new file for what a subprocess writes to standard error."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("wb")
    except OSError as failure:
        raise storage_error(log, failure) from None


def last_line(log: Path) -> str:
    """The end of what a subprocess wrote, cut to fit a message."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return lines[-1][:200]


async def _read_lines(
    process: asyncio.subprocess.Process, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    assert process.stdout is not None
    error = None
    async for line in process.stdout:
        try:
            fields = json.loads(line)
        except ValueError:
            continue  # a library's stray print is no message
        if isinstance(fields, dict) and "error" in fields:
            error = fields["error"]
        elif isinstance(fields, dict) and "progress" in fields:
            progress(fields)
    return error
