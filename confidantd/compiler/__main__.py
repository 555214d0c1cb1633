"""`python -m confidantd.compiler REQUEST.json OUT_DIR`: compile every program of a request.

Progress goes to stdout as JSON lines; the last file written is `programs.json`.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from confidantd.confinement import confine
from confidantd.errors import CompileError, ConfidantError
from confidantd.ids import digest_of
from confidantd.models.programs import canonical_request
from confidantd.models.spec import ProgramRequest
from confidantd.wire.codec import from_map


def main(arguments: list[str]) -> int:
    """Exit status 0, or 1 after an `{"error": ...}` line."""
    if len(arguments) != 2:
        print("usage: python -m confidantd.compiler REQUEST.json OUT_DIR", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # the exporter logs what it skips; failures are raised
    try:
        _compile(Path(arguments[0]), Path(arguments[1]))
    except ConfidantError as failure:
        _print({"error": failure.to_wire()})
        return 1
    return 0


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _compile(request_file: Path, folder: Path) -> None:
    try:
        request = from_map(ProgramRequest, json.loads(request_file.read_text()))
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as failure:
        raise CompileError(f"cannot use {request_file} or {folder} ({failure})") from None
    listed: dict[str, Any] = {}
    for name, data in _programs(canonical_request(request)):
        file = f"{name}.onnx"
        try:
            (folder / file).write_bytes(data)
        except OSError as failure:
            raise CompileError(f"cannot write {folder / file} ({failure.strerror})") from None
        listed[name] = {"file": file, "sha256": digest_of(data), "bytes": len(data)}
    (folder / "programs.json").write_text(json.dumps({"programs": listed}, indent=1))


def _programs(request: ProgramRequest) -> Iterator[tuple[str, bytes]]:
    """Each program's name and bytes, with progress lines in between."""
    try:
        build = importlib.import_module("confidantd.compiler.build").build  # imports torch
    except ImportError as failure:
        raise CompileError(
            f"this device cannot compile programs ({failure})",
            'install the compiler: pip install "confidantd[compiler]"',
        ) from None
    for done, of, name, data in build(request):
        _print({"progress": name, "done": done, "of": of})
        yield name, data


if __name__ == "__main__":
    confine()
    sys.exit(main(sys.argv[1:]))
