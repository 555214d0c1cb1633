"""`python -m confidantd.worker.measure QUESTION ANSWER`: what blocks of a shape take here.

In a process of its own, so that memory returns and the daemon never loads onnxruntime.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from confidantd.confinement import confine
from confidantd.engine.block_speed import Bench
from confidantd.errors import ConfidantError, DoesNotFitError
from confidantd.ids import DeviceId
from confidantd.models.spec import ProgramRequest
from confidantd.wire.codec import from_map, to_map
from confidantd.worker.traffic import message_seconds


def main(question: Path, answer: Path) -> int:
    """Exit status 0 if the answer is written, else 1 and an error line."""
    fields = json.loads(question.read_text())
    try:
        request = from_map(ProgramRequest, fields["request"])
        shape = (request.microbatch_size, request.sequence_length, request.model.block.hidden)
        device = DeviceId(fields["device"])
        bench = Bench(
            request,
            {name: Path(path) for name, path in fields["programs"].items()},
            int(fields["threads"]),
            bool(fields["ends"]),
            functools.partial(message_seconds, fields["home"], device, shape),
        )
        found = bench.speeds(lambda done, of: _say({"progress": "blocks", "done": done, "of": of}))
    except ConfidantError as failure:
        _say({"error": failure.to_wire()})
        return 1
    except MemoryError:
        _say({"error": DoesNotFitError("there is no memory to measure a block").to_wire()})
        return 1
    answer.write_text(json.dumps(to_map(found)))
    return 0


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    confine()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
