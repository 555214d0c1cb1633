"""The steps of a training job, over as many plans as it takes."""

from __future__ import annotations

from pathlib import Path

from confidantd.errors import ConfidantError
from confidantd.ids import DeviceId
from confidantd.jobs.course import Course
from confidantd.jobs.feeder import Feeder
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.options import TrainOptions
from confidantd.jobs.record import JobLog
from confidantd.jobs.recovery import Recovery
from confidantd.jobs.relocation import relocate
from confidantd.jobs.replication import Replication
from confidantd.jobs.step_progress import StepProgress
from confidantd.jobs.training_data import TokenBlocks
from confidantd.planner.plan import StagePlan
from confidantd.planner.replan import LEAST_LEFT_SECONDS, LINKS, Watch, with_links
from confidantd.planner.simulate import StageCost, holders_of
from confidantd.wire.worker import Evaluated, Snapshotted, StepDone

SETTLED_STEPS = 3  # of a plan, before it is looked at again
STEPS_AHEAD = 2  # batches that wait at the stages, so that none waits for the owner


class StepLoop:
    """Feeds steps until all are done; goes on with a better plan when stages drift."""

    def __init__(
        self,
        plans: JobPlans,
        launched: Launched,
        log: JobLog,
        course: Course,
        blocks: TokenBlocks,
        eval_folder: Path,
        options: TrainOptions,
        replication: Replication,
        recovery: Recovery,
    ) -> None:
        self._plans, self._replication, self._recovery = plans, replication, recovery
        self._log = log
        self._course = course
        self.launched = launched
        self._feeder = Feeder(launched, course, blocks, eval_folder, options, replication)
        self.progress = StepProgress(launched, course, log, lambda: replication.last)
        self._watch = _watch(launched)
        self._steps_seen = 0  # of this plan
        self._company = plans.there()
        self._unsettled = False  # the plan was made in haste, or others are there now
        self._step_seconds = 0.0
        self._spares_of: Launched | None = None

    async def run(self) -> None:
        """To the end of the last step and evaluation."""
        await self._feeder.feed_until(self.progress.done + STEPS_AHEAD)
        while not (self._feeder.done and self._drained):
            await self._hear()
            if not self._feeder.done:
                await self._follow()
            await self._feeder.feed_until(self.progress.done + STEPS_AHEAD)
            if self._steps_seen >= SETTLED_STEPS and self._spares_of is not self.launched:
                self._spares_of = self.launched
                self._plans.lay_up_spares(self.launched)

    async def _follow(self) -> None:
        """Go on with another plan where that pays, or must be."""
        leaving = self._leaving()
        if leaving:
            await self._leave(leaving)
        elif self._unsettled and self._steps_seen >= SETTLED_STEPS:
            self._unsettled = False
            await self._plans.measure_newcomers()
            await self._reconsider("other devices are there than when it was planned")
        elif self._watch.due and not await self._reconsider():
            self._watch = self._watch.stays()

    def _leaving(self) -> dict[DeviceId, str]:
        """Devices that hold a stage and have begun to take no work for others, and why."""
        refusing, refused = self._plans.refusing(), self._plans.refused
        for device in refused.keys() - refusing.keys():
            del refused[device]
            self._unsettled = True
        holders = {stage.device for stage in self.launched.plan.stages}
        return {d: why for d, why in refusing.items() if d in holders - refused.keys()}

    async def _leave(self, leaving: dict[DeviceId, str]) -> None:
        """They hand their stages over; where that cannot be, they stay for as long as they can."""
        self._plans.refused |= leaving
        names = {stage.device: stage.name for stage in self.launched.plan.stages}
        reason = "; ".join(f"{names[device]} hands over: {why}" for device, why in leaving.items())
        await self._drain()
        moved = await relocate(
            self._plans, self.launched, self.progress.done, reason, in_haste=True
        )
        await self._adopt(moved or self.launched)
        self._unsettled |= moved is not None

    def _look_around(self) -> None:
        """Who came may be of use; who refused and takes work again, too."""
        company = self._plans.there()
        self._unsettled |= not company <= self._company
        self._company = company

    async def begin(self) -> None:
        """At the step of the checkpoint, if there is one."""
        await self._replication.adopt(self.launched)
        self._go_back()

    async def recover(self, failure: ConfidantError) -> None:
        """Go on after a failure, from the last committed step; raises it if that cannot be."""
        failure = await self._recovery.cause(self.launched, failure)
        await self._replication.close()
        found = await self._recovery.recover(
            self.launched, failure, self.progress.done, self._replication.committed
        )
        await self._adopt(found)
        self._unsettled = True
        self._go_back()

    def _go_back(self) -> None:
        committed = self._replication.committed
        steps = 0 if committed is None else committed.steps
        self._feeder.go_back(steps)
        self.progress.go_back(steps)

    @property
    def _drained(self) -> bool:
        """Whether the stages have done all they were given."""
        return self.progress.done == self._feeder.fed and self._feeder.evaluations == 0

    async def _hear(self) -> None:
        """Take one event."""
        stage, event = await self.launched.pipeline.next_event()
        if isinstance(event, StepDone):
            answers = self.progress.step_done(stage, event)
            if answers is not None:
                self._compare(answers)
        elif isinstance(event, Snapshotted):
            self._replication.heard(stage, event)
        elif isinstance(event, Evaluated):
            loss = self._feeder.evaluated(event)
            if loss is not None:
                self._log.emit({"event": "eval", "step": loss[0], "loss": loss[1]})

    def _compare(self, answers: dict[int, StepDone]) -> None:
        """With what was planned. The first step of a plan also fills memory and says nothing."""
        self._steps_seen += 1
        self._look_around()
        if self._steps_seen > 1:
            plan = self.launched.plan
            self._step_seconds = max(answer.wall_seconds for answer in answers.values())
            self._watch = self._watch.observe(
                with_links(
                    self._watch.planned,
                    [_cost(plan.stages[i], answers[i]) for i in sorted(answers)],
                    [link.cost for link in plan.links],
                    plan.microbatches,
                    self._step_seconds,
                    holders_of([stage.device for stage in plan.stages]),
                )
            )

    async def _reconsider(self, reason: str = "") -> bool:
        """Go on with another plan, if there is one that pays, and say whether; without a reason,
        stages or links drift.
        """
        left = self._course.steps - self._feeder.fed
        if left * self._step_seconds <= LEAST_LEFT_SECONDS:
            return False
        if not reason and self._watch.farthest == LINKS:
            await self._drain()
            await self._plans.measure_links(self.launched)
        if not await self._plans.better_plan(self.launched, left):
            return False
        await self._drain()
        why, done = reason or self._reason(), self.progress.done
        moved = await relocate(self._plans, self.launched, done, why)
        await self._adopt(moved or self.launched)
        return moved is not None

    async def _drain(self) -> None:
        while not self._drained:
            await self._hear()

    async def _adopt(self, launched: Launched) -> None:
        if launched is not self.launched:
            self.launched, self._watch, self._steps_seen = launched, _watch(launched), 0
            self._feeder.adopt(launched)
            self.progress.adopt(launched)
        await self._replication.adopt(launched)

    def _reason(self) -> str:
        """What is farthest from the plan."""
        farthest = self._watch.farthest
        ratio = self._watch.drift.ratios[farthest]
        if farthest == LINKS:
            return f"over its links a step takes {ratio:.2g} times as long as planned"
        name = self.launched.plan.stages[int(farthest)].name
        return f"{name} takes {ratio:.2g} times as long as planned"


def _watch(launched: Launched) -> Watch:
    stages = enumerate(launched.plan.stages)
    return Watch({**{str(index): stage.seconds for index, stage in stages}, LINKS: 1.0})


def _cost(planned: StagePlan, step: StepDone) -> StageCost:
    """What a stage took, with the planned time of the optimizer, whose measured one has a wait in
    it, and of the messages that passed while it waited: others are in what it computed.
    """
    messages = planned.message_seconds * (1 - step.busy)
    forward = step.mean_seconds("forward") + messages
    backward = step.mean_seconds("backward") + messages
    return StageCost(forward, backward, planned.update_seconds, planned.message_seconds)
