"""The coordinator's work: plan over the devices that are there, and negotiate the plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from confidantd.errors import (
    ConfidantError,
    DeclinedError,
    DeviceError,
    NoCoordinatorError,
)
from confidantd.ids import DeviceId
from confidantd.jobs.peers import Peers
from confidantd.jobs.plan_inputs import (
    cannot,
    cut_requests,
    cuts_of,
    exempt_from_policy,
    kept_layers,
    kept_seconds,
    plan_devices,
    program_request,
    refusing,
    takes_no_part,
    with_current,
)
from confidantd.jobs.request_checks import check_request
from confidantd.jobs.services import SwarmView
from confidantd.planner.costs import PlanDevice
from confidantd.planner.microbatches import Cut
from confidantd.planner.plan import LeftOut, Plan, StagePlan, choose_plan
from confidantd.planner.replan import continued, standstill_seconds
from confidantd.swarm.state import CoordinatorView
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    BackendsAnswer,
    BackendsQuestion,
    KnownSpeeds,
    Offer,
    OfferAnswer,
    PlanRequest,
    SpeedsQuestion,
    StopStage,
)
from confidantd.wire.messages import clean_text
from confidantd.wire.resources import MAX_REASON_CHARACTERS
from confidantd.wire.speeds import Speeds

OFFER_SECONDS = 10.0
SPEEDS_SECONDS = 5.0  # a device reads a small file
MAX_ROUNDS = 5  # each round learns at least one device's true memory, or loses one


class Coordinator:
    """Answers `job.plan` and `job.negotiate` while this device is the coordinator."""

    def __init__(
        self,
        peers: Peers,
        swarm: SwarmView,
        current: Callable[[], CoordinatorView | None],
    ) -> None:
        self._peers = peers
        self._swarm = swarm
        self._current = current
        self._one_at_a_time = asyncio.Lock()  # two plans at once would promise memory twice
        peers.on_request("job.plan", self._plan)
        peers.on_request("job.negotiate", self._negotiate)

    async def _plan(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        self._term()
        request = from_map(PlanRequest, params)
        plan = await self._make(request, await self._cuts(request, owner), owner, ())
        return to_map(await self._with_backends(_as_planned(request, plan), plan))

    async def _negotiate(self, owner: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        request = from_map(PlanRequest, params)
        async with self._one_at_a_time:
            asked: set[DeviceId] = set()
            try:
                plan = await self._accepted(request, owner, asked)
            except BaseException:
                await asyncio.shield(self._withdraw(request, asked))
                raise
            await self._withdraw(request, asked - {s.device for s in plan.stages})
        return to_map(await self._with_backends(_as_planned(request, plan), plan))

    async def _accepted(self, request: PlanRequest, owner: DeviceId, asked: set[DeviceId]) -> Plan:
        """A plan that all its devices accepted; `asked` gets every device that was offered any."""
        cuts = await self._cuts(request, owner)
        dropped: tuple[LeftOut, ...] = ()
        for round_ in range(MAX_ROUNDS):
            plan = await self._make(request, cuts, owner, dropped)
            asked |= {stage.device for stage in plan.stages}
            declined = await self._offer_all(request, plan, owner, round_)
            if not declined:
                return plan
            dropped += _dropped(cuts[0].devices, declined)
            cuts = [Cut(c.work, _with_answers(c.devices, declined)) for c in cuts]
        reasons = "; ".join(f"{d[:8]}: {answer.reason}" for d, answer in declined.items())
        raise DeclinedError(f"the devices declined every plan ({reasons})", "try again in a minute")

    async def _cuts(self, request: PlanRequest, owner: DeviceId) -> list[Cut]:
        """Ways to cut the batch, each with the devices that may hold a stage, as fast as they
        know themselves to be.
        """
        check_request(request)
        requests = cut_requests(request)
        exempt = exempt_from_policy(request, owner)
        found = plan_devices(self._swarm.peers(), request.devices, exempt)
        devices = [with_current(d, request) for d in found if d.id not in request.without]
        question = to_map(SpeedsQuestion(tuple(map(program_request, requests))))
        asked = len(requests)
        known = await asyncio.gather(*(self._speeds(d.id, question, asked) for d in devices))
        speeds = {device.id: answer for device, answer in zip(devices, known, strict=True)}
        return list(cuts_of(requests, devices, speeds))

    async def _speeds(
        self, device: DeviceId, question: dict[str, Any], asked: int
    ) -> tuple[Speeds | None, ...]:
        try:
            found = await self._peers.request(
                device, "device.speeds", question, timeout_seconds=SPEEDS_SECONDS
            )
            speeds = from_map(KnownSpeeds, found).speeds
        except ConfidantError:  # it is planned for by its GFLOP/s
            return ()
        return speeds if len(speeds) == asked else ()

    async def _make(
        self,
        request: PlanRequest,
        cuts: list[Cut],
        owner: DeviceId,
        dropped: tuple[LeftOut, ...],
    ) -> Plan:
        """A plan over the devices; `dropped` are those that it turned out to be without."""
        if request.devices and dropped:
            raise takes_no_part(dropped[0].name, dropped[0].reason)
        if not cuts[0].devices:
            raise DeviceError("no device of the swarm is alive", "see `confidant peers`")
        plan = await asyncio.to_thread(
            choose_plan,
            cuts,
            owner,
            count=request.microbatches,
            use_all=bool(request.devices),
            layers=request.layers,
            ends=request.owner_ends,
            explained=request.explain,
        )
        chosen = next(c for c in cuts if c.work.microbatches == plan.microbatches)
        work, devices = chosen.work, chosen.devices
        peers, exempt = self._swarm.peers(), exempt_from_policy(request, owner)
        others = (*cannot(request, peers), *refusing(peers, request.devices, exempt), *dropped)
        asked = {device.id for device in devices}
        absent = {other.device: other for other in others if other.device not in asked}
        left_out = (*plan.left_out, *absent.values())
        kept = kept_seconds(work, devices, request.current)
        waits = standstill_seconds(work, devices, kept_layers(request.current, plan))
        return replace(plan, left_out=left_out, kept_seconds=kept, standstill_seconds=waits)

    async def _with_backends(self, request: PlanRequest, plan: Plan) -> Plan:
        """The plan with each device's own shares between its backends."""
        stages = await asyncio.gather(*(self._stage_backends(request, s) for s in plan.stages))
        return replace(plan, stages=tuple(stages))

    async def _stage_backends(self, request: PlanRequest, stage: StagePlan) -> StagePlan:
        if not stage.unmeasured:
            return stage
        question = BackendsQuestion(program_request(request), stage.form)
        try:
            found = await self._peers.request(
                stage.device, "stage.backends", to_map(question), timeout_seconds=OFFER_SECONDS
            )
            answer = from_map(BackendsAnswer, found)
        except ConfidantError:  # only what is shown depends on the answer
            return stage
        if not answer.shares:
            return stage
        return replace(stage, backends=answer.shares, unmeasured=())

    async def _offer_all(
        self, request: PlanRequest, plan: Plan, owner: DeviceId, round_: int
    ) -> dict[DeviceId, OfferAnswer]:
        """Offer every stage; answers of those that declined, with the memory that they have for
        this job, that of a stage which they accepted included.
        """
        term = self._term()
        answers = await asyncio.gather(
            *(
                self._offer(stage.device, offer)
                for stage, offer in zip(
                    plan.stages, _offers(request, plan, owner, term, round_), strict=True
                )
            )
        )
        pairs = list(zip(plan.stages, answers, strict=True))
        accepted: dict[DeviceId, int] = {}
        for stage, answer in pairs:
            if answer.accepted:
                accepted[stage.device] = accepted.get(stage.device, 0) + stage.memory_bytes
        return {
            stage.device: replace(
                answer,
                available_bytes=answer.available_bytes + accepted.get(stage.device, 0),
            )
            for stage, answer in pairs
            if not answer.accepted
        }

    async def _withdraw(self, request: PlanRequest, devices: set[DeviceId]) -> None:
        """Free what earlier rounds were granted; a device that is gone has freed it anyway."""
        message = to_map(StopStage(request.job, request.epoch))
        await asyncio.gather(
            *(
                self._peers.request(
                    device, "stage.withdraw", message, timeout_seconds=OFFER_SECONDS
                )
                for device in devices
            ),
            return_exceptions=True,
        )

    async def _offer(self, device: DeviceId, offer: Offer) -> OfferAnswer:
        try:
            answer = await self._peers.request(
                device, "stage.offer", to_map(offer), timeout_seconds=OFFER_SECONDS
            )
            return from_map(OfferAnswer, answer)
        except ConfidantError as failure:  # it left, refuses, or talks nonsense: plan without it
            return OfferAnswer(False, 0, failure.message, refuses=True)

    def _term(self) -> int:
        current = self._current()
        if current is None or current.id != self._peers.self_id:
            raise NoCoordinatorError("this device is not the coordinator any more", "try again")
        return current.term


def _as_planned(request: PlanRequest, plan: Plan) -> PlanRequest:
    """The request with the number of microbatches that the plan has chosen."""
    return replace(request, microbatches=plan.microbatches)


def _offers(
    request: PlanRequest, plan: Plan, owner: DeviceId, term: int, round_: int
) -> list[Offer]:
    """One for each stage of a plan."""
    old = [stage.device for stage in request.current]
    following = continued(old, [stage.device for stage in plan.stages])
    return [
        Offer(
            job=request.job,
            epoch=request.epoch,
            term=term,
            owner=owner,
            stage=index,
            stages=len(plan.stages),
            first_layer=stage.first_layer,
            past_last_layer=stage.past_last_layer,
            memory_bytes=stage.memory_bytes,
            goes_on=following.get(index),
            round=round_,
        )
        for index, stage in enumerate(plan.stages)
    ]


def _with_answers(
    devices: tuple[PlanDevice, ...], declined: dict[DeviceId, OfferAnswer]
) -> tuple[PlanDevice, ...]:
    """The devices, with the memory that the decliners said they have; without those that take
    no part at all.
    """
    return tuple(
        replace(device, available_bytes=declined[device.id].available_bytes)
        if device.id in declined
        else device
        for device in devices
        if device.id not in declined or not declined[device.id].refuses
    )


def _dropped(
    devices: tuple[PlanDevice, ...], declined: dict[DeviceId, OfferAnswer]
) -> tuple[LeftOut, ...]:
    """The devices that take no part any more, with their reasons."""
    return tuple(
        LeftOut(d.id, d.name, clean_text(declined[d.id].reason, MAX_REASON_CHARACTERS))
        for d in devices
        if d.id in declined and declined[d.id].refuses
    )
