"""From one plan of a running job to a better one, between two steps: every device keeps what
both plans give it, the rest goes from device to device with its moments, in a new epoch.
"""

from __future__ import annotations

import asyncio
import logging

from confidantd.errors import ConfidantError
from confidantd.jobs.faults import OWN_FAULTS
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.moving import exports, handed_over, trained_sizes
from confidantd.jobs.pipeline import Pipeline, stop_stages
from confidantd.planner.plan import Plan
from confidantd.tasks import plain_errors
from confidantd.wire.stage import StateEntry
from confidantd.wire.worker import Export, Exported

_log = logging.getLogger(__name__)


async def relocate(
    plans: JobPlans, launched: Launched, steps_done: int, reason: str, *, in_haste: bool = False
) -> Launched | None:
    """Go on with the plan of now, between two steps; None if that cannot be: then the job
    goes on as it was. In haste the plan is the one that moves least.

    Devices that join load their stages first. Only when all of them are ready do the
    others let go of what they no longer need.
    """
    log = plans.log
    log.record.state = "recovering"
    try:
        await plans.next_epoch()
        if in_haste:
            plan = await plans.ask_least_moving(launched)
        else:
            plan = await plans.ask("job.negotiate", launched.current())
    except ConfidantError as failure:
        _stays(plans, failure)
        return None
    pipeline: Pipeline | None = None
    try:
        state = await _exported(plans, launched, plan)
        pipeline = plans.pipeline(plan, state, launched, steps_done)
        await plain_errors(pipeline.start_new())
    except BaseException as failure:
        devices = {stage.device for stage in plan.stages}
        key = (log.record.id, plans.epoch)
        await asyncio.shield(stop_stages(plans.services.peers, devices, *key))
        if pipeline is not None:
            await asyncio.shield(pipeline.stop())
        if not isinstance(failure, ConfidantError) or launched.pipeline.failed:
            raise
        if pipeline is not None:
            _blame(plans, pipeline, plan)
        _stays(plans, failure)
        return None
    try:
        await plain_errors(pipeline.start_rest())
        plans.emit_replan(reason, steps_done)
        await plans.show(plan)
        await launched.pipeline.stop()  # of the stages that did not go on
    except BaseException:
        await asyncio.shield(asyncio.gather(pipeline.stop(), launched.pipeline.stop()))
        _blame(plans, pipeline, plan)
        raise
    log.record.state = "running"
    return plans.launched(pipeline, plan)


def _blame(plans: JobPlans, pipeline: Pipeline, plan: Plan) -> None:
    """Where a stage failed on its own."""
    failed = pipeline.failed_stage
    if failed is not None and failed[1].code in OWN_FAULTS:
        plans.leave_out(plan, failed)


def _stays(plans: JobPlans, failure: ConfidantError) -> None:
    _log.warning("job %s stays as it is: %s", plans.log.record.id, failure)
    plans.log.record.state = "running"


async def _exported(plans: JobPlans, launched: Launched, plan: Plan) -> dict[str, StateEntry]:
    """What stages hand over, by tensor name, once it lies in their devices' stores."""
    pipeline, stages, workload = launched.pipeline, launched.plan.stages, plans.workload
    commands: dict[int, Export] = exports(stages, plan.stages, tied=workload.spec.tied)
    for index, command in commands.items():
        await pipeline.command(index, command)
    found: dict[str, StateEntry] = {}
    waiting = set(commands)
    while waiting:
        index, event = await pipeline.next_event()
        if isinstance(event, Exported) and index in waiting:
            waiting.discard(index)
            sizes = trained_sizes(workload.spec, workload.method, workload.lora, commands[index])
            found |= handed_over(event.blobs, sizes, stages[index].device)
    return found
