"""From a plan to what each of its devices is told: one assignment a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from confidantd.errors import ProtocolError
from confidantd.ids import DeviceId, JobId
from confidantd.jobs.moving import wanted, whole_stage
from confidantd.jobs.setup import Workload
from confidantd.planner.plan import Plan, StagePlan
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
    before: Sequence[StagePlan],
    state: Mapping[str, StateEntry],
    steps_done: int,
    goes_back: bool = False,
) -> list[StageAssignment]:
    """One assignment per stage of the plan, each with just the tensors it needs.

    A stage that goes on from one of those `before` keeps what both have; of the rest
    `state` is taken over from others, and what nobody trains comes from the model. Where the
    job `goes_back` some steps, `state` counts for what a stage keeps, too.
    """
    tied = workload.spec.tied
    lacking = wanted(before, plan.stages, tied=tied)
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
        trained = {"full": names, "lora": adapter, None: ()}[workload.method]
        if goes_back:
            trained = tuple(whole_stage(workload.spec, workload.method, workload.lora, stage))
        if (steps_done or before) and any(name not in state for name in trained):
            # nothing that is trained may come from the model in the middle of a job
            raise ProtocolError("a stage was not handed all that was trained of it")
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
                rows=max(1, workload.load),
                steps_done=steps_done,
                state=tuple(state[n] for n in trained if n in state),
            )
        )
    return found
