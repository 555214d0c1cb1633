"""From a workload to a running pipeline: plan, prepare, load every stage, connect them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from confidantd.errors import ConfidantError
from confidantd.jobs.faults import OWN_FAULTS
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.pipeline import Pipeline, stop_stages
from confidantd.jobs.prepare import prepare
from confidantd.planner.plan import Plan


class Launcher:
    """Brings up the first pipeline of a job, without the devices whose stages fail."""

    def __init__(self, plans: JobPlans) -> None:
        self._plans = plans
        self._failed: ConfidantError | None = None

    async def launch(self) -> Launched:
        """A pipeline at the first step; emits `progress` and `plan` events on the way.

        A device whose stage fails on its own is left out, and the rest is planned anew.
        """
        plans = self._plans
        while True:
            if plans.material is None:
                await self.prepare()
            plan = await self._planned("job.negotiate")
            pipeline: Pipeline | None = None
            try:
                await plans.show(plan)
                pipeline = plans.pipeline(plan, {}, None, 0)
                await pipeline.start()
            except BaseException as failure:
                await asyncio.shield(self._stop(pipeline, plan))
                if pipeline is None or not isinstance(failure, Exception):
                    raise
                if not await self.goes_on_without(pipeline, plan):
                    raise
                continue
            return plans.launched(pipeline, plan)

    async def _stop(self, pipeline: Pipeline | None, plan: Plan) -> None:
        """Free what was promised."""
        if pipeline is not None:
            await pipeline.stop()
            return
        plans, devices = self._plans, {stage.device for stage in plan.stages}
        await stop_stages(plans.services.peers, devices, plans.log.record.id, plans.epoch)

    async def prepare(self) -> None:
        """Refuse what cannot be before compiling, cut the batch, and get all that is needed."""
        plans = self._plans
        plan = await self._planned("job.plan")
        plans.workload = replace(plans.asked, microbatches=plan.microbatches)
        plans.material = await prepare(plans.services, plans.log, plans.workload, plans.devices)

    async def _planned(self, method: str) -> Plan:
        """A plan for the devices that are left; without one, why the last one was left out."""
        try:
            return await self._plans.ask(method)
        except ConfidantError as failure:
            if self._failed is None:
                raise
            rest = f"; without it: {failure.message}"
            raise type(self._failed)(f"{self._failed.message}{rest}", self._failed.hint) from None

    async def goes_on_without(self, pipeline: Pipeline, plan: Plan) -> bool:
        """Whether a stage of a pipeline failed on its own, on a device that others can replace.

        If so its device is left out from now on, and the next epoch begins. If the user has
        not said how to cut the batch, others may cut it better.
        """
        failed, plans = pipeline.failed_stage, self._plans
        if failed is None or failed[1].code not in OWN_FAULTS or plans.devices:
            return False
        plans.leave_out(plan, failed)
        self._failed = failed[1]
        await plans.next_epoch()
        if plans.asked.microbatches == 0:
            plans.workload, plans.material = plans.asked, None
        name = plan.stages[failed[0]].name
        plans.emit_replan(f"{name} is left out ({failed[1].message})", 0)
        return True
