"""Compiled programs for tests: each request is compiled once, in a real compiler process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from confidantd.models.programs import request_key
from confidantd.models.spec import ProgramRequest
from confidantd.wire.codec import to_map

_COMPILE_SECONDS = 300


@cache
def folder() -> Path:
    """`CONFIDANT_TEST_PROGRAMS` keeps programs between runs; else they end with this run."""
    kept = os.environ.get("CONFIDANT_TEST_PROGRAMS")
    if kept:
        return Path(kept)
    holder = tempfile.TemporaryDirectory(prefix="programs-")
    _HOLDERS.append(holder)
    return Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed at interpreter exit


def compile_into(request: ProgramRequest, folder: Path) -> dict[str, Path]:
    """Run the compiler; gives each program's file."""
    folder.mkdir(parents=True, exist_ok=True)
    question = folder / "request.json"
    question.write_text(json.dumps(to_map(request)))
    command = [sys.executable, "-m", "confidantd.compiler", str(question), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = json.loads((folder / "programs.json").read_text())["programs"]
    return {name: folder / entry["file"] for name, entry in listed.items()}


def programs_for(request: ProgramRequest) -> dict[str, Path]:
    """The compiled programs of a request by name."""
    made = folder() / request_key(request)
    index = made / "programs.json"
    if not index.exists():
        return compile_into(request, made)
    listed = json.loads(index.read_text())["programs"]
    return {name: made / entry["file"] for name, entry in listed.items()}
