"""What can compute here and how fast: probed once in a subprocess, then remembered.

ONNX Runtime and the drivers below it are loaded there only; this process stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
from pathlib import Path

from confidantd.errors import StorageError
from confidantd.profile.providers import Provider, read_providers
from confidantd.store.files import write_atomically

_log = logging.getLogger(__name__)

MODULE = "confidantd.engine.backends.probing"
PLUGIN_GROUP = "confidantd.backends"
OUR_PACKAGES = ("confidantd", "onnxruntime")  # names begin so: providers and builds too
# The probe gives each backend 30 s and then goes on with the next; this is for the probe itself.
SECONDS_PER_BACKEND = 40.0
# What appears when a processor is plugged in or its driver installed: names in these folders.
DRIVER_FOLDERS = (
    "/dev/dri", "/dev/accel", "/proc/driver/nvidia/gpus", "/etc/OpenCL/vendors",
    "/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d",
)  # fmt: skip

_FAILURES = (TimeoutError, OSError, ValueError, KeyError, TypeError, AttributeError)


async def measure_backends(
    threads: int, cache: Path, wanted: tuple[str, ...] = ()
) -> tuple[Provider, ...]:
    """Every provider, the CPU first; nothing if they cannot be probed.

    With `wanted` only those, and the CPU's, are measured. Remembered in `cache` until a
    package, a driver or the settings change, but not while one is broken: whoever
    restarts the daemon may have repaired it.
    """
    key = f"{await asyncio.to_thread(_key, threads)}; {','.join(sorted(wanted))}"
    found = await asyncio.to_thread(_read, cache, key)
    if found and not any(provider.broken for provider in found):
        return found
    found = await _probe(threads, wanted)
    if found:
        entries = [provider.to_json() for provider in found]
        data = json.dumps({"key": key, "backends": entries}).encode()
        try:
            await asyncio.to_thread(write_atomically, cache, data)
        except StorageError as failure:
            _log.warning("the speed of this device is not remembered: %s", failure)
    return found


async def _probe(threads: int, wanted: tuple[str, ...]) -> tuple[Provider, ...]:
    backends = 1 + await asyncio.to_thread(lambda: len(list(_plugins())))
    names = ("--backends", ",".join(wanted))
    command = (sys.executable, "-m", MODULE, "--threads", str(threads), *names)
    try:
        output = await _output(command, SECONDS_PER_BACKEND * backends)
        return read_providers(json.loads(output)["backends"])
    except _FAILURES:
        _log.warning("the speed of this device could not be measured: is onnxruntime installed?")
        return ()


async def _output(command: tuple[str, ...], seconds: float) -> bytes:
    """What the command prints; it is killed, with all that it started, when it takes too long
    or the caller is cancelled.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
        return output
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # all of them have just ended
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())


def _key(threads: int) -> str:
    """Changes when another answer is to be expected."""
    packages = sorted({name for folder in sys.path for name in _installed(folder)})
    plugins = sorted(_describe(entry) for entry in _plugins())
    drivers = sorted(f"{folder}/{name}" for folder in DRIVER_FOLDERS for name in _names(folder))
    return "; ".join([*packages, *plugins, *drivers, f"{threads} of {os.cpu_count()} threads"])


def _installed(folder: str) -> list[str]:
    """`onnxruntime-1.32.0` and the like, by name: to read all metadata would take memory."""
    suffixes = (".dist-info", ".egg-info")
    names = (name for name in _names(folder) if name.endswith(suffixes))
    return [name.rpartition(".")[0] for name in names if name.startswith(OUR_PACKAGES)]


def _describe(entry: importlib.metadata.EntryPoint) -> str:
    package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
    return f"{entry.name}{package}"


def _plugins() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=PLUGIN_GROUP)


def _names(folder: str) -> list[str]:
    try:
        return [path.name for path in Path(folder).iterdir()]
    except OSError:
        return []


def _read(cache: Path, key: str) -> tuple[Provider, ...]:
    try:
        found = json.loads(cache.read_text())
        return read_providers(found["backends"]) if found["key"] == key else ()
    except _FAILURES:
        return ()
