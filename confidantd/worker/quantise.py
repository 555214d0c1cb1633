"""`python -m confidantd.worker.quantise QUESTION FOLDER`: quantises tensors of a checkpoint.

In a process of its own, so that memory returns and the daemon never loads numpy. The answer is
one file a tensor, named by its place in the question.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from confidantd.confinement import confine
from confidantd.engine.quantised import quantise
from confidantd.engine.tensors import tensor_from_file
from confidantd.errors import ConfidantError, DoesNotFitError, ModelError
from confidantd.models.block_format import BlockFormat
from confidantd.store.files import storage_error


def main(question: Path, folder: Path) -> int:
    """Exit status 0 if every tensor is written, else 1 and an error line."""
    try:
        tensors = json.loads(question.read_text())
        for index, tensor in enumerate(tensors):
            _quantise(tensor, folder / str(index))
            _say({"progress": tensor["name"], "done": index + 1, "of": len(tensors)})
    except ConfidantError as failure:
        _say({"error": failure.to_wire()})
        return 1
    except MemoryError:
        _say({"error": DoesNotFitError("there is no memory to quantise the model").to_wire()})
        return 1
    return 0


def _quantise(tensor: dict[str, Any], target: Path) -> None:
    form = BlockFormat.parse(tensor["format"])
    shape = tuple(int(size) for size in tensor["shape"])
    stored = tensor_from_file(Path(tensor["file"]), tensor["offset"], tensor["dtype"], shape)
    if form is None or stored.ndim != 2:
        raise ModelError(f"{tensor['name']} cannot be quantised")
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            found = quantise(stored.T if tensor["transposed"] else stored, form)
    except ValueError as failure:
        raise ModelError(f"{tensor['name']} cannot be quantised: {failure}") from None
    try:
        with target.open("wb") as file:
            file.write(found.numbers.data)
            file.write(found.scales.data)
    except OSError as failure:
        raise storage_error(target, failure) from None


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    confine()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
