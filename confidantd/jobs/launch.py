"""From a workload to a running pipeline, and from one plan of it to the next.

A job begins with `prepare` and `launch`. While it runs, `better_plan` asks what would be
planned now, and `move` goes on with that between two steps: every device keeps what both
plans give it, the rest goes from device to device with its moments, in a new epoch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from confidantd.errors import ConfidantError, DeviceError
from confidantd.ids import DeviceId
from confidantd.jobs.assign import Material, assignments
from confidantd.jobs.moving import exports, handed_over, trained_sizes
from confidantd.jobs.pipeline import Pipeline, Placed, stop_stages
from confidantd.jobs.prepare import prepare
from confidantd.jobs.record import JobLog
from confidantd.jobs.services import JobServices, SwarmView, ask_coordinator, emit_progress
from confidantd.jobs.setup import Workload
from confidantd.jobs.stage_notes import StageNotes
from confidantd.planner.plan import Plan
from confidantd.planner.replan import continued, worth_moving
from confidantd.tasks import plain_errors
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    CurrentStage,
    LinkAnswer,
    LinkSeen,
    MeasureLink,
    PlanRequest,
    StageProgress,
)
from confidantd.wire.stage import OptimizerSpec, StageSpec, StateEntry
from confidantd.wire.worker import Export, Exported

_log = logging.getLogger(__name__)

LINK_SECONDS = 15.0  # a measurement ends after 3
# What a stage that failed on its own says; a lost link is a symptom of something else.
OWN_FAULTS = ("does-not-fit", "worker-failed", "backend-failed")


@dataclass(frozen=True, slots=True)
class Launched:
    """A pipeline whose stages are loaded and connected."""

    pipeline: Pipeline
    plan: Plan
    specs: tuple[StageSpec, ...]

    def current(self) -> tuple[CurrentStage, ...]:
        """Its stages, for the next plan."""
        return tuple(
            CurrentStage(s.device, s.past_last_layer - s.first_layer, s.form, s.memory_bytes)
            for s in self.plan.stages
        )


class Launcher:
    """Brings up the pipelines of one job, one after the other."""

    def __init__(
        self,
        services: JobServices,
        log: JobLog,
        workload: Workload,
        devices: tuple[str, ...],
        optimizer: OptimizerSpec,
        seed: int,
    ) -> None:
        self._services, self._log, self._asked = services, log, workload
        self._workload = workload
        self._devices, self._optimizer, self._seed = devices, optimizer, seed
        self._without: dict[DeviceId, str] = {}
        self._links: dict[tuple[DeviceId, DeviceId], LinkSeen] = {}
        self._failed: ConfidantError | None = None
        self._epoch = log.record.epoch
        self._material: Material | None = None

    async def launch(self) -> Launched:
        """A pipeline at the first step; emits `progress` and `plan` events on the way.

        A device whose stage fails on its own is left out, and the rest is planned anew.
        """
        while True:
            if self._material is None:
                await self._prepare()
            plan = await self._planned("job.negotiate")
            await self._show(plan)
            pipeline = self._pipeline(plan, {}, None, 0)
            try:
                await pipeline.start_new()
                await pipeline.start_rest()
            except BaseException as failure:
                await asyncio.shield(pipeline.stop())
                if not isinstance(failure, Exception) or not self.goes_on_without(pipeline, plan):
                    raise
                continue
            return self._launched(pipeline, plan)

    async def _prepare(self) -> None:
        """Refuse what cannot be before compiling, cut the batch, and get all that is needed."""
        plan = await self._planned("job.plan")
        self._workload = replace(self._asked, microbatches=plan.microbatches)
        self._material = await prepare(self._services, self._log, self._workload, self._devices)

    async def _planned(self, method: str) -> Plan:
        """A plan for the devices that are left; without one, why the last one was left out."""
        try:
            return await self._ask(method)
        except ConfidantError as failure:
            if self._failed is None:
                raise
            rest = f"; without it: {failure.message}"
            raise type(self._failed)(f"{self._failed.message}{rest}", self._failed.hint) from None

    def goes_on_without(self, pipeline: Pipeline, plan: Plan) -> bool:
        """Whether a stage of a pipeline failed on its own, on a device that others can replace.

        If so its device is left out from now on, and the next epoch begins. If the user has
        not said how to cut the batch, others may cut it better.
        """
        failed = pipeline.failed_stage
        if failed is None or failed[1].code not in OWN_FAULTS or self._devices:
            return False
        self._leave_out(plan, failed)
        self._next_epoch()
        if self._asked.microbatches == 0:
            self._workload, self._material = self._asked, None
        name = plan.stages[failed[0]].name
        self._emit_replan(f"{name} is left out ({failed[1].message})", 0)
        return True

    def _leave_out(self, plan: Plan, failed: tuple[int, ConfidantError]) -> None:
        if failed[1].code in OWN_FAULTS:
            self._failed = failed[1]
            device = plan.stages[failed[0]].device
            self._without[device] = f"its stage failed: {failed[1].message}"

    async def better_plan(self, launched: Launched, steps_left: int) -> bool:
        """Whether another plan than the running one would pay for the move; reserves nothing."""
        try:
            plan = await self._ask("job.plan", launched.current())
        except ConfidantError as failure:
            _log.info("job %s: no new plan (%s)", self._log.record.id, failure)
            return False
        kept = plan.kept_seconds
        if kept is None or self._same(plan, launched.plan):
            return False
        return worth_moving(kept, plan.seconds, steps_left, plan.standstill_seconds)

    async def measure_links(self, launched: Launched) -> None:
        """Measure the pipeline's links, one after the other, while nothing runs over them."""
        devices = [stage.device for stage in launched.plan.stages]
        pairs = {tuple(sorted(pair)) for pair in itertools.pairwise(devices)}
        for one, other in sorted(pairs):
            ways = [await self._link_mbps(one, other), await self._link_mbps(other, one)]
            found = [mbps for mbps in ways if mbps is not None]
            if found:  # else what was known of it counts on
                self._links[one, other] = LinkSeen(one, other, min(found))

    async def _link_mbps(self, source: DeviceId, target: DeviceId) -> float | None:
        try:
            answer = await self._services.peers.request(
                source, "device.link", to_map(MeasureLink(target)), timeout_seconds=LINK_SECONDS
            )
            return from_map(LinkAnswer, answer).mbps
        except ConfidantError:
            return None

    async def move(self, launched: Launched, steps_done: int, reason: str) -> Launched | None:
        """Go on with the plan of now, between two steps; None if that cannot be: then the job
        goes on as it was.

        Devices that join load their stages first. Only when all of them are ready do the
        others let go of what they no longer need; what fails after that ends the job.
        """
        self._epoch += 1
        self._log.record.state = "recovering"
        try:
            plan = await self._ask("job.negotiate", launched.current())
        except ConfidantError as failure:
            self._stays(failure)
            return None
        pipeline: Pipeline | None = None
        try:
            state = await self._exported(launched, plan)
            pipeline = self._pipeline(plan, state, launched.plan, steps_done)
            await plain_errors(pipeline.start_new())
        except BaseException as failure:
            devices = {stage.device for stage in plan.stages}
            key = (self._log.record.id, self._epoch)
            await asyncio.shield(stop_stages(self._services.peers, devices, *key))
            if not isinstance(failure, ConfidantError) or launched.pipeline.failed:
                raise
            if pipeline is not None and pipeline.failed_stage is not None:
                self._leave_out(plan, pipeline.failed_stage)
            self._stays(failure)
            return None
        try:
            await pipeline.start_rest()
            self._log.record.epoch = self._epoch
            self._emit_replan(reason, steps_done)
            await self._show(plan)
            await launched.pipeline.stop()  # of the stages that did not go on
        except BaseException:
            await asyncio.shield(asyncio.gather(pipeline.stop(), launched.pipeline.stop()))
            raise
        self._log.record.state = "running"
        return self._launched(pipeline, plan)

    def _stays(self, failure: ConfidantError) -> None:
        _log.warning("job %s stays as it is: %s", self._log.record.id, failure)
        self._log.record.state = "running"

    def _same(self, plan: Plan, other: Plan) -> bool:
        return [(s.device, s.first_layer, s.past_last_layer, s.form) for s in plan.stages] == [
            (s.device, s.first_layer, s.past_last_layer, s.form) for s in other.stages
        ]

    async def _ask(self, method: str, current: tuple[CurrentStage, ...] = ()) -> Plan:
        request = self._workload.plan_request(self._log.record.id, self._epoch, self._devices)
        return await ask_coordinator(self._services, method, self._request(request, current))

    def _request(self, request: PlanRequest, current: tuple[CurrentStage, ...]) -> PlanRequest:
        links = tuple(self._links.values())
        return replace(request, current=current, without=self._without, links=links)

    async def _show(self, plan: Plan) -> None:
        """The plan is the job's from now on, on disk too."""
        self._log.record.devices = list(dict.fromkeys(stage.name for stage in plan.stages))
        self._log.emit({"event": "plan", **plan.to_json()})
        await self._log.save()

    def _pipeline(
        self, plan: Plan, state: Mapping[str, StateEntry], before: Plan | None, steps_done: int
    ) -> Pipeline:
        """The pipeline of a negotiated plan; its stages are not started yet."""
        assert self._material is not None
        found = assignments(
            self._workload,
            plan,
            self._material,
            job=self._log.record.id,
            epoch=self._epoch,
            source=self._services.self_id,
            optimizer=self._optimizer,
            seed=self._seed,
            before=before,
            state=state,
            steps_done=steps_done,
        )
        old = [stage.device for stage in before.stages] if before else []
        following = continued(old, [stage.device for stage in plan.stages])
        placed = [
            Placed(
                stage.device,
                _host(self._services.swarm, stage.device),
                assignment,
                goes_on=index in following,
            )
            for index, (stage, assignment) in enumerate(zip(plan.stages, found, strict=True))
        ]
        notes, progress = StageNotes(self._log, plan), _StageProgressLog(self._log).add
        services = self._services
        return Pipeline(services.peers, services.router, placed, progress, notes)

    async def _exported(self, launched: Launched, plan: Plan) -> dict[str, StateEntry]:
        """What stages hand over, by tensor name, once it lies in their devices' stores."""
        pipeline, stages = launched.pipeline, launched.plan.stages
        commands = exports(stages, plan.stages, tied=self._workload.spec.tied)
        for index, command in commands.items():
            await pipeline.command(index, command)
        found: dict[str, StateEntry] = {}
        waiting = set(commands)
        while waiting:
            index, event = await pipeline.next_event()
            if isinstance(event, Exported) and index in waiting:
                waiting.discard(index)
                sizes = self._sizes(commands[index])
                found |= handed_over(event, sizes, stages[index].device)
        return found

    def _sizes(self, command: Export) -> dict[str, int]:
        workload = self._workload
        return trained_sizes(workload.spec, workload.method, workload.lora, command)

    def _launched(self, pipeline: Pipeline, plan: Plan) -> Launched:
        return Launched(pipeline, plan, tuple(p.assignment.spec for p in pipeline.placed))

    def _next_epoch(self) -> None:
        self._epoch += 1
        self._log.record.epoch = self._epoch

    def _emit_replan(self, reason: str, steps_done: int) -> None:
        self._log.emit({
            "event": "replan", "epoch": self._epoch, "reason": reason,
            "resumed_from_step": steps_done,
        })  # fmt: skip


def _host(swarm: SwarmView, device: DeviceId) -> str:
    for peer in swarm.peers():
        if peer.id == device:
            return peer.address.rpartition(":")[0] if peer.address else "127.0.0.1"
    raise DeviceError("a device of the plan left before the job began", "start again")


class _StageProgressLog:
    """Sums what the stages report into one `progress` event per phase."""

    def __init__(self, log: JobLog) -> None:
        self._log = log
        self._latest: dict[int, StageProgress] = {}

    def add(self, progress: StageProgress) -> None:
        """Take one stage's report."""
        self._latest[progress.stage] = progress
        done = sum(p.done for p in self._latest.values())
        of = sum(p.of for p in self._latest.values())
        emit_progress(self._log, progress.phase, done, of, "bytes")
