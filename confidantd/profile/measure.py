"""How fast this device multiplies matrices: measured once in a subprocess, then remembered."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import sys
from pathlib import Path

from confidantd.errors import StorageError
from confidantd.store.files import write_atomically

_log = logging.getLogger(__name__)

MEASURE_SECONDS = 30.0  # the measurement takes 1.5 s; importing on a weak board takes longer


async def measure_speed(threads: int, cache: Path) -> float:
    """GFLOP/s of the CPU provider (float32 product); 0.0 if it cannot be measured."""
    key = await asyncio.to_thread(_key, threads)
    remembered = await asyncio.to_thread(_read, cache)
    if key in remembered:
        return remembered[key]
    gflops = await _measure(threads)
    if gflops > 0:
        data = json.dumps({**remembered, key: gflops}).encode()
        try:
            await asyncio.to_thread(write_atomically, cache, data)
        except StorageError as failure:
            _log.warning("the speed of this device is not remembered: %s", failure)
    return gflops


async def _measure(threads: int) -> float:
    command = (sys.executable, "-m", "confidantd.engine.measure", "--threads", str(threads))
    try:
        output = await _output(command)
        return float(json.loads(output)["gflops"])
    except (TimeoutError, OSError, ValueError, KeyError, TypeError):
        _log.warning("the speed of this device could not be measured: is onnxruntime installed?")
        return 0.0


async def _output(command: tuple[str, ...]) -> bytes:
    """What the command prints; it is killed when it takes too long or the caller is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(MEASURE_SECONDS):
            output, _ = await process.communicate()
        return output
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())


def _key(threads: int) -> str:
    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    return f"onnxruntime {version}, {threads} of {os.cpu_count()} threads"


def _read(cache: Path) -> dict[str, float]:
    try:
        found = json.loads(cache.read_text())
        return {str(key): float(value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
