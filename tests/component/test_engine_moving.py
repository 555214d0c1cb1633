"""A training job whose stages change between two steps computes what it would have without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from confidantd.engine.tensors import Floats
from confidantd.engine.train_stage import TrainStage
from confidantd.engine.trained_weights import State, no_state
from confidantd.ids import DeviceId, Digest
from confidantd.models.folder import ModelFolder
from confidantd.models.spec import LoraSpec, ProgramRequest
from confidantd.wire.stage import StateEntry, parts_of
from confidantd.wire.worker import STATE_BYTES, BlobRange, Snapshot
from confidantd.worker.blobs import state_reader
from confidantd.worker.results import write_snapshot
from tests.component.engine_models import (
    ROWS,
    TOKENS,
    Adapter,
    Pipeline,
    reader,
    save_model,
    stage_specs,
    training_pipeline,
)
from tests.component.test_engine_training import MOST_NORM, RATE, batch
from tests.programs import programs_for

STEPS, MOVED_AFTER = 4, 2
NOBODY = DeviceId("")
LORA = Adapter(LoraSpec(4, 8.0, ("q_proj", "v_proj")))
# (device, first layer, past the last) of each new stage; devices 0 and 1 hold layers 0 and 1-2.
MOVES = {
    "a border moves": [(0, 0, 2), (1, 2, 3)],
    "a device leaves": [(0, 0, 3)],
    "the first device leaves": [(1, 0, 3)],
    "devices join at both ends": [(2, 0, 1), (1, 1, 2), (3, 2, 3)],
    "they change places": [(1, 0, 2), (0, 2, 3)],
}


def moved(
    model: ModelFolder,
    pipeline: Pipeline,
    layout: Sequence[tuple[int, int, int]],
    adapter: Adapter | None,
) -> Pipeline:
    """The pipeline with other stages: each device keeps what it can, the rest comes as files
    would bring it.
    """
    method: Any = "full" if adapter is None else "lora"
    lora = None if adapter is None else adapter.lora
    every = frozenset({*range(model.spec.layers), "embedding", "head"})
    states: dict[str, Floats] = {
        source.name: np.stack(arrays)
        for stage in pipeline.stages
        for source, arrays in stage.states(every)
    }
    programs = programs_for(ProgramRequest(model.spec, "train", method, lora, ROWS, TOKENS))
    stages: list[TrainStage] = []
    for place, (device, first, past_last) in enumerate(layout):
        spec = replace(
            stage_specs(model, 1, training=method, lora=lora)[0],
            first_layer=first,
            past_last_layer=past_last,
            embedding=place == 0,
            head=place == len(layout) - 1,
        )
        if device < len(pipeline.stages):
            stage = pipeline.stages[device]
            stage.become(spec, reader(model.tensors), None, states.get, MOVED_AFTER)
        else:
            stage = TrainStage(
                spec, programs, reader(model.tensors), None, 1, state=states.get,
                steps_done=MOVED_AFTER,
            )  # fmt: skip
        stages.append(stage)
    return Pipeline(stages, pipeline.norms)


@pytest.mark.parametrize("layout", MOVES.values(), ids=MOVES.keys())
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "lora"])
def test_nothing_changes_but_who_computes(tmp_path: Path, kind: str, layout: Any) -> None:
    adapter = LORA if kind == "lora" else None
    model = save_model("llama" if kind == "lora" else kind, tmp_path)
    runs = [training_pipeline(model, 2, adapter=adapter) for _ in range(2)]
    losses: list[list[float]] = [[], []]
    for step in range(STEPS):
        if step == MOVED_AFTER:
            runs[1] = moved(model, runs[1], layout, adapter)
        for run, found in zip(runs, losses, strict=True):
            found.append(run.step(*batch(step, 2), RATE, MOST_NORM))
    # both ends of a tied table on one device add their gradients up in another order
    joined = kind == "llama-tied" and len(layout) == 1
    assert losses[1] == (pytest.approx(losses[0], rel=1e-6) if joined else losses[0])
    assert runs[1].norms == pytest.approx(runs[0].norms, rel=1e-6 if joined else 1e-12)
    wanted, found = runs[0].trained(), runs[1].trained()
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        if joined:
            assert np.allclose(found[name], array, rtol=0, atol=1e-5), name
        else:
            assert np.array_equal(found[name], array), name


def test_what_stays_is_not_copied_and_what_went_elsewhere_is_let_go(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    pipeline = training_pipeline(model, 1)
    (stage,) = pipeline.stages
    pipeline.step(*batch(0, 2), RATE, MOST_NORM)
    whole = stage.resident_bytes()
    last = model.spec.layers - 1
    spec = replace(stage_specs(model, 1, training="full")[0], past_last_layer=last, head=False)
    before = {source.name: arrays[0] for source, arrays in stage.states(parts_of(spec))}
    stage.become(spec, reader(model.tensors), None, no_state, 0)
    after = {source.name: arrays[0] for source, arrays in stage.states(parts_of(spec))}
    assert after.keys() == before.keys()
    assert all(np.shares_memory(after[name], before[name]) for name in before)
    assert not list(stage.states(frozenset({last, "head"})))
    found = stage.resident_bytes()
    assert found["weights"] == sum(array.nbytes for array in after.values())
    assert found["moments"] == 2 * found["weights"] < whole["moments"]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "lora"])
def test_going_back_some_steps_gives_the_same_steps_again(tmp_path: Path, kind: str) -> None:
    """From files, after a step that did not end."""
    adapter = LORA if kind == "lora" else None
    model = save_model("llama" if kind == "lora" else kind, tmp_path)
    pipeline = training_pipeline(model, 2, adapter=adapter)
    losses, states = [], []
    for step in range(STEPS):
        if step == MOVED_AFTER:
            states = [snapshot(stage, tmp_path / str(i)) for i, stage in enumerate(pipeline.stages)]
        losses.append(pipeline.step(*batch(step, 2), RATE, MOST_NORM))
    wanted = {name: array.copy() for name, array in pipeline.trained().items()}
    pipeline.gradients(*batch(0, 2))
    method: Any = "full" if adapter is None else "lora"
    specs = stage_specs(model, 2, training=method, lora=None if adapter is None else adapter.lora)
    for stage, spec, state in zip(pipeline.stages, specs, states, strict=True):
        stage.become(spec, reader(model.tensors), None, state, MOVED_AFTER)
        assert stage.resident_bytes()["kept"] == 0
    again = [pipeline.step(*batch(s, 2), RATE, MOST_NORM) for s in range(MOVED_AFTER, STEPS)]
    assert again == losses[MOVED_AFTER:]
    found = pipeline.trained()
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


def snapshot(stage: TrainStage, folder: Path) -> State:
    """A stage's state as it is read back from its files."""
    folder.mkdir()
    written = write_snapshot(stage, Snapshot(MOVED_AFTER, folder=str(folder)))
    assert written.steps == MOVED_AFTER
    blobs, entries = {}, []
    for number, blob in enumerate(written.blobs):
        digest, offset = Digest(f"{number:064x}"), 0
        assert Path(blob.path).stat().st_size == blob.bytes
        blobs[digest] = BlobRange(blob.path, 0, blob.bytes)
        for tensor in blob.tensors:
            entries.append(StateEntry(tensor.name, tensor.size, blob.bytes, digest, NOBODY, offset))
            offset += STATE_BYTES * tensor.size
    assert len({entry.name for entry in entries}) == len(entries)
    return state_reader(tuple(entries), blobs)
