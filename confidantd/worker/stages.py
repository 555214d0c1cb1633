"""From a `Load` to what a worker runs: programs, weights, backends, links."""

from __future__ import annotations

from pathlib import Path

from confidantd.engine.generation.stage import FusedStage, GeneratingStage
from confidantd.engine.scratch import Scratch
from confidantd.engine.split.decode_stage import SplitStage
from confidantd.engine.split.fastest import faster
from confidantd.engine.tensors import Reader
from confidantd.engine.train_stage import TrainStage
from confidantd.planner.memory import MOST_PREFILL
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import Load
from confidantd.worker.backends import PipeReport, SplitFile, chosen_backends
from confidantd.worker.blobs import (
    any_reader,
    program_paths,
    reader,
    scratch_bytes,
    state_reader,
)
from confidantd.worker.links import Links
from confidantd.worker.tied import tied_partner, tied_rows

# Given where blocks are large enough for several backends:
TRAIN_SPLIT_PROGRAM, DECODE_SPLIT_PROGRAM = "attention_forward", "attention_decode"


def partners(place: StageAssignment) -> set[int]:
    """The stages this one exchanges tensors with: neighbours, and the other end where needed."""
    found = {s for s in (place.stage - 1, place.stage + 1) if 0 <= s < place.stages}
    ends = {0, place.stages - 1}
    if place.spec.training is None and place.stage in ends:
        found |= ends - {place.stage}  # the chosen token goes from the head to stage 0
    tied = tied_partner(place)
    return found if tied is None else found | {tied}


def make_links(load: Load) -> Links:
    """The links of a stage; no frame may be larger than the largest tensor of the schedule."""
    place, spec = load.assignment, load.assignment.spec
    rows = spec.microbatch_size * spec.sequence_length if spec.training else MOST_PREFILL
    largest = rows * spec.model.block.hidden
    if spec.model.tied and spec.training == "full":
        width = spec.model.block.hidden
        largest = max(largest, tied_rows(width) * width)
    return Links(
        load.home, place.job, place.epoch, place.stage, place.stages, max_tensor_bytes=4 * largest
    )


def make_train_stage(load: Load, report: PipeReport) -> TrainStage:
    """Programs and weights of a training stage, and who computes its blocks."""
    place = load.assignment
    stage = TrainStage(
        place.spec,
        program_paths(place.programs, load.blobs),
        reader(place.tensors, load.blobs),
        _adapter_reader(load),
        place.threads,
        state=state_reader(place.state, load.blobs),
        steps_done=place.steps_done,
    )
    _schedule(stage, load, report, TRAIN_SPLIT_PROGRAM)
    return stage


def become(stage: TrainStage, load: Load, report: PipeReport) -> None:
    """Make a training stage into another one."""
    place = load.assignment
    stage.become(
        place.spec,
        reader(place.tensors, load.blobs),
        _adapter_reader(load),
        state_reader(place.state, load.blobs),
        place.steps_done,
    )
    _schedule(stage, load, report, TRAIN_SPLIT_PROGRAM)


def make_generating_stage(load: Load, report: PipeReport) -> GeneratingStage:
    """A generating stage, one program on the CPU unless it is faster on several backends."""
    place, read_adapter = load.assignment, _adapter_reader(load)

    def fused() -> GeneratingStage:
        with Scratch(Path(load.home), scratch_bytes(place.tensors)) as scratch:
            read = any_reader(place.tensors, load.blobs, scratch)
            return FusedStage(place.spec, read, read_adapter, place.threads)

    def shared() -> GeneratingStage:
        programs = program_paths(place.programs, load.blobs)
        read = reader(place.tensors, load.blobs)
        stage = SplitStage(place.spec, programs, read, read_adapter, place.threads)
        _schedule(stage, load, report, DECODE_SPLIT_PROGRAM)
        return stage

    if len(load.backends) < 2 or DECODE_SPLIT_PROGRAM not in place.programs:
        return fused()
    return shared() if load.split == "always" else faster(place.spec, fused, shared, report)


def _adapter_reader(load: Load) -> Reader | None:
    """None where there is no adapter to start from."""
    tensors = load.assignment.adapter_tensors
    return reader(tensors, load.blobs) if tensors else None


def _schedule(
    stage: TrainStage | SplitStage, load: Load, report: PipeReport, split_program: str
) -> None:
    """Share out its blocks, where there are several backends and programs for parts of blocks."""
    if len(load.backends) > 1 and split_program in load.assignment.programs:
        backends = chosen_backends(load.backends, report)
        stage.schedule(backends, SplitFile(load.split_file), report, load.split)
