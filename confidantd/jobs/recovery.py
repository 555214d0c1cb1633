"""After a loss: in a new epoch, over the devices that are left, from the last committed step.

What still runs elsewhere goes on: its workers drop the step that cannot end, go back to their
own copy of the committed step, and take over what the lost stages held from the owner's disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Set as AbstractSet

from confidantd.errors import ConfidantError, StorageError
from confidantd.jobs.checkpoints import Checkpoint
from confidantd.jobs.faults import CURABLE, OWN_FAULTS, PASSING, Faults
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.launch import Launcher
from confidantd.jobs.pipeline import Pipeline, stop_stages
from confidantd.jobs.services import emit_progress
from confidantd.planner.plan import Plan
from confidantd.tasks import plain_errors

_log = logging.getLogger(__name__)

WAIT_SECONDS = 600.0  # for devices without which the model does not fit
BEGIN_SECONDS = 30.0  # for a job that does not run yet: somebody waits for its first word
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.2, 2.0
REUNION_SECONDS = 10.0
SETTLE_SECONDS = 0.5  # how long commands of a broken pipeline wait for the cause
MOST_IN_VAIN = 5  # losses in a row without a step done between them


class Recovery:
    """That of one job, from its first loss to its last."""

    def __init__(self, plans: JobPlans) -> None:
        self._plans = plans
        self._faults = Faults()
        self._in_vain = 0
        self._went_on_at = self._steps = 0
        self._hopeless = False

    async def begin(self) -> Launched:
        """The first pipeline; devices that go while it is brought up are planned without."""
        try:
            return await plain_errors(Launcher(self._plans).launch())
        except ConfidantError as failure:
            if failure.code not in PASSING:
                raise
            _log.info("job %s begins again: %s", self._plans.log.record.id, failure)
        return await self._patiently(None, None, BEGIN_SECONDS, PASSING)

    async def cause(self, launched: Launched, failure: ConfidantError) -> ConfidantError:
        """What ended a pipeline: a command that cannot be sent is a symptom of it."""
        if not launched.pipeline.failed and failure.code in CURABLE:
            await asyncio.sleep(SETTLE_SECONDS)
        return launched.pipeline.failure or failure

    async def recover(
        self,
        launched: Launched,
        failure: ConfidantError,
        steps_done: int,
        checkpoint: Checkpoint | None,
        goes_on_at: int = 0,
    ) -> Launched:
        """The next pipeline. Raises `failure` if it cannot be cured, or nothing helps.

        Without a checkpoint it is a new one; what it was given so far, `goes_on_at`, the caller
        gives it again.
        """
        self._count(steps_done)
        own_disk = failure.code == StorageError.code and launched.pipeline.failed_stage is None
        if failure.code not in CURABLE or self._in_vain > MOST_IN_VAIN or own_disk:
            raise failure
        plans = self._plans
        plans.log.record.state = "recovering"
        emit_progress(plans.log, "recover", 0, 1, failure.message)
        self._blame(launched.pipeline, launched.plan)
        reason = self._reason(launched, failure)
        if checkpoint is None:
            await launched.pipeline.stop()
            self._went_on_at = goes_on_at
            found = await self._patiently(None, None)
            plans.emit_replan(reason, goes_on_at)
        else:
            self._went_on_at = checkpoint.steps
            found = await self._patiently(launched, checkpoint)
            plans.emit_replan(reason, checkpoint.steps)
            await plans.show(found.plan)
        plans.log.record.state = "running"
        return found

    async def resume(self, checkpoint: Checkpoint | None) -> Launched:
        """The first pipeline of a job that another run of the daemon began."""
        plans = self._plans
        plans.log.record.state, plans.make_do = "recovering", True
        await self._wait_for(set(plans.log.record.devices))
        found = await self._patiently(None, checkpoint)
        steps = 0 if checkpoint is None else checkpoint.steps
        plans.emit_replan("the job was resumed", steps)
        if checkpoint is not None:
            await plans.show(found.plan)
        return found

    async def _wait_for(self, names: set[str]) -> None:
        """The devices of the last plan, for a moment: this one has just started, perhaps."""
        for _ in range(int(REUNION_SECONDS / FIRST_PAUSE_SECONDS)):
            peers = self._plans.services.swarm.peers()
            if names <= {p.name for p in peers if p.is_self or p.state == "alive"}:
                return
            await asyncio.sleep(FIRST_PAUSE_SECONDS)

    def _count(self, steps_done: int) -> None:
        """The last try was in vain if it did no step, or ended where the one before did."""
        further = steps_done > self._went_on_at and steps_done != self._steps
        self._in_vain = 0 if further else self._in_vain + 1
        self._steps = steps_done

    def _blame(self, pipeline: Pipeline, plan: Plan) -> None:
        """Leave a device out whose stage fails on its own, at once if it has too little memory;
        raise its failure where the user wants it to take part, or there is no other.
        """
        failed = pipeline.failed_stage
        if failed is None or failed[1].code not in OWN_FAULTS:
            return
        device = plan.stages[failed[0]].device
        if self._faults.again(device, failed[1].code, self._steps):
            others = self._plans.there() - self._plans.without.keys() - {device}
            if self._plans.devices or not others:
                self._hopeless = True
                raise failed[1]
            self._plans.leave_out(plan, failed)

    def _reason(self, launched: Launched, failure: ConfidantError) -> str:
        """What happened, and where."""
        failed = launched.pipeline.failed_stage
        if failed is None or failed[1] is not failure:
            return failure.message
        stage = launched.plan.stages[failed[0]]
        if stage.device in self._plans.without:
            return f"{stage.name} is left out ({failure.message})"
        return f"{stage.name}: {failure.message}"

    async def _patiently(
        self,
        launched: Launched | None,
        checkpoint: Checkpoint | None,
        seconds: float = WAIT_SECONDS,
        curable: AbstractSet[str] = CURABLE,
    ) -> Launched:
        """Try until it works: devices come back, and a coordinator is elected."""
        deadline, pause, said = time.monotonic() + seconds, FIRST_PAUSE_SECONDS, ""
        while True:
            if launched is not None and launched.pipeline.stopped:
                launched = None
            try:
                found = await self._try(launched, checkpoint)
                self._plans.log.record.message = None
                return found
            except ConfidantError as failure:
                if self._hopeless or failure.code not in curable or time.monotonic() > deadline:
                    raise
                if failure.message != said:
                    _log.info("job %s waits: %s", self._plans.log.record.id, failure)
                said = self._plans.log.record.message = failure.message
                emit_progress(self._plans.log, "recover", 0, 1, failure.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_SECONDS)

    async def _try(self, launched: Launched | None, checkpoint: Checkpoint | None) -> Launched:
        """With the workers that run, once; when they were stopped with new ones."""
        plans = self._plans
        await plans.next_epoch()
        if plans.material is None and checkpoint is not None:
            await Launcher(plans).prepare()
        if checkpoint is None:
            if plans.asked.microbatches == 0:  # other devices may cut the batch better
                plans.workload, plans.material = plans.asked, None
            return await plain_errors(Launcher(plans).launch())
        lost = set() if launched is None else self._lost(launched)
        plan = await self._plan(launched, lost)
        pipeline: Pipeline | None = None
        try:
            pipeline = plans.pipeline(
                plan, checkpoint.entries, launched, checkpoint.steps, lost=lost, goes_back=True
            )
            await plain_errors(pipeline.start())
        except BaseException:
            await asyncio.shield(self._stop(launched, pipeline, plan))
            if pipeline is not None:
                self._blame(pipeline, plan)
            raise
        if launched is not None:
            await launched.pipeline.stop()  # of the stages that did not go on
        return plans.launched(pipeline, plan)

    async def _plan(self, launched: Launched | None, lost: set[int]) -> Plan:
        """Where workers run, one that moves little: a better one is found later."""
        plans = self._plans
        if launched is None:
            return await plans.ask("job.negotiate")
        return await plans.ask_least_moving(launched, lost)

    def _lost(self, launched: Launched) -> set[int]:
        """Stages that cannot go on: of devices that are or were away, or whose worker has ended."""
        peers = self._plans.services.swarm.peers()
        there = {peer.id for peer in peers if peer.is_self or peer.state == "alive"}
        there -= launched.pipeline.lost_devices
        stages = enumerate(launched.plan.stages)
        away = {index for index, stage in stages if stage.device not in there}
        return away | launched.pipeline.ended_stages

    async def _stop(self, launched: Launched | None, pipeline: Pipeline | None, plan: Plan) -> None:
        """What an attempt left half done cannot be gone on with."""
        plans, devices = self._plans, {stage.device for stage in plan.stages}
        if launched is not None:
            await launched.pipeline.stop()
        if pipeline is not None:
            await pipeline.stop()
        await stop_stages(plans.services.peers, devices, plans.log.record.id, plans.epoch)
