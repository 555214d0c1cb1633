"""`python -m benchmarks.too_big_alone MODEL PROMPT NEW`: the engine alone on a model's file.

Prints its tokens a second as JSON; so many tokens of prompt and new ones.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from confidantd.engine.generation.stage import FusedStage
from confidantd.engine.tensors import Array, tensor_from_file
from confidantd.models.folder import read_model
from confidantd.wire.stage import StageSpec


def main() -> None:
    """As the stage of a whole model does it."""
    model, prompt, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    found = read_model(model)

    def read(name: str) -> Array:
        place = found.tensors[name]
        return tensor_from_file(place.file, place.offset, place.dtype, place.shape)

    layers = found.spec.layers
    spec = StageSpec(found.spec, 0, layers, embedding=True, head=True, training=None)
    stage = FusedStage(spec, read, None, 1)
    logits = stage.forward([0], np.full((1, prompt), ord("x"), np.int64))
    began = time.perf_counter()
    for _ in range(count):
        logits = stage.forward([0], np.argmax(logits[:, -1:], axis=-1))
    seconds = time.perf_counter() - began
    print(json.dumps({"tokens_per_second": count / seconds}))


if __name__ == "__main__":
    main()
