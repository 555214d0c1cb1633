"""From a plan to what each of its devices is told: one assignment a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from confidantd.errors import ProtocolError
from confidantd.ids import DeviceId, JobId
from confidantd.jobs.moving import wanted
from confidantd.jobs.setup import Workload
from confidantd.planner.plan import Plan
from confidantd.wire.stage import (
    OptimizerSpec,
    ProgramEntry,
    StageAssignment,
    StageSpec,
    StateEntry,
    TensorEntry,
)


@dataclass(frozen=True, slots=True)
class Material:
    """Programs by name, and the digests of the model's and the adapter's tensors."""

    programs: dict[str, ProgramEntry]
    tensors: Mapping[str, TensorEntry]
    adapter: Mapping[str, TensorEntry]


def assignments(
    workload: Workload,
    plan: Plan,
    material: Material,
    *,
    job: JobId,
    epoch: int,
    source: DeviceId,
    optimizer: OptimizerSpec,
    seed: int,
    before: Plan | None,
    state: Mapping[str, StateEntry],
    steps_done: int,
) -> list[StageAssignment]:
    """One assignment per stage of the plan, each with just the tensors it needs.

    A stage that goes on from one of the plan `before` keeps what both have; of the rest
    `state` is taken over from others, and what nobody trains comes from the checkpoint.
    """
    tied = workload.spec.tied
    lacking = wanted(before.stages if before else (), plan.stages, tied=tied)
    rows = workload.batch_size // workload.microbatches
    found = []
    for index, stage in enumerate(plan.stages):
        spec = StageSpec(
            model=workload.spec,
            first_layer=stage.first_layer,
            past_last_layer=stage.past_last_layer,
            embedding=stage.embedding,
            head=stage.head,
            training=workload.method,
            lora=workload.lora,
            form=stage.form,
            microbatch_size=rows,
            sequence_length=workload.sequence_length,
            seed=seed,
            optimizer=optimizer,
        )
        names = lacking[index].tensor_names(workload.spec)
        adapter = lacking[index].adapter_names(workload.spec, workload.lora)
        if before is not None:
            _check_complete(workload, names, adapter, state)
        found.append(
            StageAssignment(
                job=job,
                epoch=epoch,
                stage=index,
                stages=len(plan.stages),
                microbatches=workload.microbatches,
                spec=spec,
                source=source,
                programs=material.programs,
                tensors=tuple(material.tensors[n] for n in names if n not in state),
                adapter_tensors=tuple(
                    material.adapter[n] for n in adapter if n in material.adapter and n not in state
                ),
                cpu_only=stage.cpu_only,
                steps_done=steps_done,
                state=tuple(state[n] for n in (*names, *adapter) if n in state),
            )
        )
    return found


def _check_complete(
    workload: Workload,
    names: tuple[str, ...],
    adapter: tuple[str, ...],
    state: Mapping[str, StateEntry],
) -> None:
    """Nothing that is trained may come from the checkpoint in the middle of a job."""
    trained = {"full": names, "lora": adapter, None: ()}[workload.method]
    if any(name not in state for name in trained):
        raise ProtocolError("a stage was not handed all that was trained of it")
