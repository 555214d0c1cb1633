"""What a job asks the coordinator for, epoch after epoch, and the pipelines of its plans."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from confidantd.errors import (
    ConfidantError,
    DeclinedError,
    DeviceError,
    DoesNotFitError,
    PeerLostError,
)
from confidantd.ids import DeviceId, short_id
from confidantd.jobs.assign import Material, assignments
from confidantd.jobs.moving import Share, takeover
from confidantd.jobs.pipeline import Pipeline, Placed
from confidantd.jobs.prepare import measure_devices
from confidantd.jobs.record import JobLog
from confidantd.jobs.services import JobServices, SwarmView, ask_coordinator, emit_progress
from confidantd.jobs.setup import Workload
from confidantd.jobs.spares import wanted_spares
from confidantd.jobs.stage_notes import StageNotes
from confidantd.planner.plan import Plan
from confidantd.planner.replan import continued, worth_moving
from confidantd.tasks import TaskSet
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    CurrentStage,
    LinkAnswer,
    LinkSeen,
    MeasureLink,
    Spares,
    StageProgress,
)
from confidantd.wire.messages import clean_text
from confidantd.wire.resources import MAX_REASON_CHARACTERS
from confidantd.wire.stage import OptimizerSpec, StageSpec, StateEntry

_log = logging.getLogger(__name__)

SPARES_SECONDS = 10.0
LINK_SECONDS = 15.0  # a measurement ends after 3
NOBODY = DeviceId("")  # holds the stages that are lost


@dataclass(frozen=True, slots=True)
class Launched:
    """A pipeline whose stages are loaded and connected."""

    pipeline: Pipeline
    plan: Plan
    specs: tuple[StageSpec, ...]

    def current(self, lost: Collection[int] = ()) -> tuple[CurrentStage, ...]:
        """Its stages, for the next plan; those that are `lost` are nobody's."""
        return tuple(
            CurrentStage(
                NOBODY if index in lost else s.device,
                s.past_last_layer - s.first_layer,
                s.form,
                0 if index in lost else s.memory_bytes,
            )
            for index, s in enumerate(self.plan.stages)
        )


class JobPlans:
    """The plans of one job. `workload` is what was `asked` until a plan has cut its batch."""

    def __init__(
        self,
        services: JobServices,
        log: JobLog,
        workload: Workload,
        devices: tuple[str, ...],
        optimizer: OptimizerSpec,
        seed: int,
    ) -> None:
        self.services, self.log, self.workload = services, log, workload
        self.asked = workload
        self.devices, self._optimizer, self._seed = devices, optimizer, seed
        self.make_do = False  # with those of the devices that are there
        self.without: dict[DeviceId, str] = {}  # cannot hold a stage, and why
        self.refused: dict[DeviceId, str] = {}  # handed their stage over, and why
        self.material: Material | None = None
        self._pipelines: list[Pipeline] = []
        self._tasks = TaskSet("plans")
        self._links: dict[tuple[DeviceId, DeviceId], LinkSeen] = {}

    @property
    def epoch(self) -> int:
        """Of what is asked for now."""
        return self.log.record.epoch

    async def next_epoch(self) -> None:
        """Begin it, on disk before any device hears of it: no other run of the job may use it."""
        self.log.record.epoch += 1
        await self.log.save()

    async def ask(
        self,
        method: str,
        current: tuple[CurrentStage, ...] = (),
        shares: tuple[Share, ...] = (),
    ) -> Plan:
        """`job.plan` only looks, `job.negotiate` reserves. With `shares` just that plan."""
        devices = self.present() if self.make_do else self.devices
        if self.devices and not devices:
            raise PeerLostError(f"none of {', '.join(self.devices)[:200]} is there")
        request = self.workload.plan_request(self.log.record.id, self.epoch, devices)
        if shares:
            layers = tuple(layers for _, layers in shares)
            request = replace(request, devices=tuple(d for d, _ in shares), layers=layers)
        elif len(devices) != len(self.devices):
            request = replace(request, layers=())
        links = tuple(self._links.values())
        request = replace(request, current=current, without=self.unwanted, links=links)
        return await ask_coordinator(self.services, method, request)

    def present(self) -> tuple[str, ...]:
        """Those of the devices that were asked for that are there now."""
        peers = self.services.swarm.peers()
        there = {
            name
            for peer in peers
            if peer.is_self or peer.state == "alive"
            for name in (peer.name, peer.id, short_id(peer.id))
        }
        return tuple(name for name in self.devices if name in there)

    async def ask_least_moving(self, launched: Launched, lost: Collection[int] = ()) -> Plan:
        """Negotiate the plan in which others take over what devices held that are away or shall
        not be used, if that fits; else the best one.
        """
        current, there = launched.current(lost), self.there() - self.unwanted.keys()
        stages = launched.plan.stages
        away = {index for index, stage in enumerate(stages) if stage.device not in there}
        shares = takeover(stages, away)
        if shares:
            try:
                return await self.ask("job.negotiate", current, shares)
            except (DoesNotFitError, DeclinedError, DeviceError) as failure:
                _log.info("job %s is planned anew: %s", self.log.record.id, failure)
        return await self.ask("job.negotiate", current)

    def leave_out(self, plan: Plan, failed: tuple[int, ConfidantError]) -> None:
        """Plan without the device of a failed stage from now on."""
        self.without[plan.stages[failed[0]].device] = f"its stage failed: {failed[1].message}"

    async def close(self) -> None:
        """End every pipeline that was made."""
        await self._tasks.close()
        await asyncio.gather(*(p.stop() for p in self._pipelines if not p.stopped))

    @property
    def unwanted(self) -> dict[DeviceId, str]:
        """Devices that get no stage, and why."""
        return {**self.refused, **self.without}

    def there(self) -> set[DeviceId]:
        """Devices that may take part, this one included."""
        wanted = set(self.present())
        return {
            peer.id
            for peer in self.services.swarm.peers()
            if peer.is_self or peer.state == "alive"
            if not wanted or wanted & {peer.name, peer.id, short_id(peer.id)}
        }

    def refusing(self) -> dict[DeviceId, str]:
        """Devices that take no work for others now, with what they say."""
        return {
            peer.id: clean_text(peer.resources.refuses, MAX_REASON_CHARACTERS)
            for peer in self.services.swarm.peers()
            if not peer.is_self and peer.resources is not None and peer.resources.refuses
        }

    async def measure_newcomers(self) -> None:
        """Devices that came while the job runs measure blocks of its shape, if they never did."""
        assert self.material is not None
        await measure_devices(
            self.services, self.log, self.workload, self.present(), self.material.programs
        )

    def lay_up_spares(self, launched: Launched) -> None:
        """Let devices fetch what they need when others are lost; only a hint."""
        self._tasks.start(self._lay_up_spares(launched), "spares")

    async def _lay_up_spares(self, launched: Launched) -> None:
        if self.workload.method != "lora" or self.material is None:
            return
        stages, tensors = launched.plan.stages, self.material.tensors
        for index, behind in wanted_spares(self.workload.spec, stages).items():
            if stages[index].device == self.services.self_id:
                continue  # it has the model
            for other, names in behind.items():
                found = tuple(tensors[name] for name in names)
                message = Spares(self.log.record.id, stages[other].device, found)
                with contextlib.suppress(ConfidantError):
                    await self.services.peers.request(
                        stages[index].device, "stage.spares", to_map(message),
                        timeout_seconds=SPARES_SECONDS,
                    )  # fmt: skip

    async def better_plan(self, launched: Launched, steps_left: int) -> bool:
        """Whether another plan than the running one would pay for the move; reserves nothing."""
        try:
            plan = await self.ask("job.plan", launched.current())
        except ConfidantError as failure:
            _log.info("job %s: no new plan (%s)", self.log.record.id, failure)
            return False
        kept = plan.kept_seconds
        if kept is None or _places(plan) == _places(launched.plan):
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
            answer = await self.services.peers.request(
                source, "device.link", to_map(MeasureLink(target)), timeout_seconds=LINK_SECONDS
            )
            return from_map(LinkAnswer, answer).mbps
        except ConfidantError:
            return None

    async def show(self, plan: Plan) -> None:
        """The plan is the job's from now on, on disk too."""
        self.log.record.devices = list(dict.fromkeys(stage.name for stage in plan.stages))
        self.log.emit({"event": "plan", **plan.to_json()})
        await self.log.save()

    def emit_replan(self, reason: str, steps_done: int) -> None:
        """Say that the job goes on in another epoch."""
        self.log.emit({
            "event": "replan", "epoch": self.epoch, "reason": reason,
            "resumed_from_step": steps_done,
        })  # fmt: skip

    def pipeline(
        self,
        plan: Plan,
        state: Mapping[str, StateEntry],
        before: Launched | None,
        steps_done: int,
        *,
        lost: Collection[int] = (),
        goes_back: bool = False,
    ) -> Pipeline:
        """The pipeline of a negotiated plan; its stages are not started yet.

        Devices go on with what they hold of the pipeline `before`, but for the `lost` stages.
        """
        assert self.material is not None
        current = [] if before is None else before.current(lost)
        stages = () if before is None else before.plan.stages
        old = [replace(stage, device=c.device) for stage, c in zip(stages, current, strict=True)]
        found = assignments(
            self.workload,
            plan,
            self.material,
            job=self.log.record.id,
            epoch=self.epoch,
            source=self.services.self_id,
            optimizer=self._optimizer,
            seed=self._seed,
            before=old,
            state=state,
            steps_done=steps_done,
            goes_back=goes_back,
        )
        following = continued([s.device for s in old], [stage.device for stage in plan.stages])
        placed = [
            Placed(
                stage.device,
                _host(self.services.swarm, stage.device),
                assignment,
                goes_on=index in following,
            )
            for index, (stage, assignment) in enumerate(zip(plan.stages, found, strict=True))
        ]
        notes, progress = StageNotes(self.log, plan), _Progress(self.log).add
        made = Pipeline(self.services.peers, self.services.router, placed, progress, notes)
        self._pipelines = [*(p for p in self._pipelines if not p.stopped), made]
        return made

    def launched(self, pipeline: Pipeline, plan: Plan) -> Launched:
        """A pipeline that has started."""
        return Launched(pipeline, plan, tuple(p.assignment.spec for p in pipeline.placed))


def _places(plan: Plan) -> list[tuple[object, ...]]:
    return [(s.device, s.first_layer, s.past_last_layer, s.form) for s in plan.stages]


def _host(swarm: SwarmView, device: DeviceId) -> str:
    for peer in swarm.peers():
        if peer.id == device:
            return peer.address.rpartition(":")[0] if peer.address else "127.0.0.1"
    raise PeerLostError("a device of the plan has left the swarm", "start again")


class _Progress:
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
