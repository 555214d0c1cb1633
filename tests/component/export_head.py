"""`python -m tests.component.export_head REQUEST.json FILE`: writes the head's backward alone, so
that a test need not wait for the blocks of a model of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from confidantd.compiler.export import export
from confidantd.compiler.training import head_programs
from confidantd.models.spec import ProgramRequest
from confidantd.wire.codec import from_map


def main(request: str, file: str) -> None:
    """One program."""
    asked = from_map(ProgramRequest, json.loads(Path(request).read_text()))
    Path(file).write_bytes(export(head_programs(asked)[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
