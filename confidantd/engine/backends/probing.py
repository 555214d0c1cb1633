"""`python -m confidantd.engine.backends.probing --threads N`: what can compute here, how fast.

Prints `{"backends": [...]}`, an entry for every provider that is installed or known:
`{"name", "present", "broken", "version", "devices": [{"name", "kind"}], "gflops",
"memory_gbps", "problem", "hint"}`. Not present and not broken: not installed, or without a
processor to run on. Each backend is probed in a process of its own (`--only NAME`), since a
driver may hang or take the process down.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from typing import Any

from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.backends.known import PLUGINS, KnownPlugin
from confidantd.engine.backends.registry import load_backend, plugin_names
from confidantd.engine.backends.speed import measure
from confidantd.errors import BackendError, NoDeviceError

# A healthy one takes 2 s on a laptop; importing on a weak board and compiling take longer.
PROBE_SECONDS = 30.0
MAX_REASON_CHARACTERS = 200

Entry = dict[str, Any]


def probe_all(
    threads: int, wanted: Collection[str] = (), seconds: float = PROBE_SECONDS
) -> list[Entry]:
    """The CPU, then plugins, then what could be installed; one after the other, each alone.

    With `wanted`, plugins of other names are only listed; a name that nothing has is broken.
    """
    names = [CpuBackend.name, *plugin_names()]
    entries = [
        _not_wanted(name)
        if wanted and name not in (*wanted, CpuBackend.name)
        else probe_apart(name, threads, seconds)
        for name in names
    ]
    entries += [
        # named in the settings and not here: that is a fault, and not just a possibility
        {**_not_installed(known), "broken": known.name in wanted}
        for known in PLUGINS
        if known.name not in names
    ]
    there = [entry["name"] for entry in entries]
    return entries + [_unknown(name, there) for name in wanted if name not in there]


def probe_one(name: str, threads: int) -> Entry:
    """Probe and measure a backend in this process."""
    entry = _entry(name)
    try:
        backend = load_backend(name)
        found = backend.probe()
        entry["version"] = found.version
        entry["devices"] = [{"name": d.name, "kind": d.kind} for d in found.devices]
        speed = measure(backend, threads)
    except BackendError as failure:
        broken = not isinstance(failure, NoDeviceError)
        return {**entry, "broken": broken, "problem": failure.message, "hint": failure.hint}
    return {
        **entry, "present": True, "gflops": speed.gflops, "memory_gbps": speed.memory_gbps,
    }  # fmt: skip


def _entry(name: str) -> Entry:
    return {
        "name": name, "present": False, "broken": False, "version": None, "devices": [],
        "gflops": None, "memory_gbps": None, "problem": "", "hint": "",
    }  # fmt: skip


def _not_wanted(name: str) -> Entry:
    return {**_entry(name), "problem": "installed, but the settings name other backends"}


def _unknown(name: str, there: list[str]) -> Entry:
    near = difflib.get_close_matches(name, there, 1)
    known = f"did you mean {near[0]}?" if near else f"known: {', '.join(there)}"
    return {**_entry(name), "broken": True, "problem": "no plugin brings it", "hint": known}


def _not_installed(known: KnownPlugin) -> Entry:
    if known.fits_here():
        problem, hint = f"not installed (for {known.hardware})", known.install()
    else:
        problem, hint = f"not for this device (for {known.hardware})", ""
    return {**_entry(known.name), "problem": problem, "hint": hint}


def probe_apart(name: str, threads: int, seconds: float = PROBE_SECONDS) -> Entry:
    """Probe and measure a backend in a process of its own, which may end as it likes."""
    command = [sys.executable, "-m", __spec__.name, "--only", name, "--threads", str(threads)]
    try:
        done = subprocess.run(  # noqa: S603  # this program, on a backend that is installed
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return _broken(name, f"it did not answer within {seconds:.0f} s and was stopped")
    found = _last_object(done.stdout)
    if found is not None:  # also if a driver crashes when its process ends
        return found
    return _broken(name, _why_it_ended(done.returncode, done.stderr))


def _broken(name: str, problem: str) -> Entry:
    return {**_entry(name), "broken": True, "problem": problem}


def _last_object(output: bytes) -> Entry | None:
    """The JSON object that was printed last; a library's stray print is none."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def _why_it_ended(status: int, errors: bytes) -> str:
    if status < 0:
        return f"it crashed while it was probed ({_signal_name(-status)})"
    lines = errors.decode(errors="replace").strip().splitlines()
    said = lines[-1][:MAX_REASON_CHARACTERS] if lines else f"status {status}"
    return f"it failed while it was probed ({said})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="what can compute on this device, how fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", default="", metavar="NAMES", help="with commas; else all")
    parser.add_argument("--only", metavar="NAME", help="one backend, in this process")
    arguments = parser.parse_args()
    threads = max(1, arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for providers that know no other setting
    if arguments.only:
        print(json.dumps(probe_one(arguments.only, threads)), flush=True)
    else:
        wanted = [name for name in arguments.backends.split(",") if name]
        print(json.dumps({"backends": probe_all(threads, wanted)}), flush=True)


if __name__ == "__main__":
    main()
