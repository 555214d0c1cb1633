"""Plans among devices that refuse work: the coordinator and the devices' own decisions, with
messages handed over in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from confidantd.errors import DeviceError, PeerLostError, ProtocolError, UsageError
from confidantd.ids import DeviceId, JobId
from confidantd.jobs.coordinator import Coordinator
from confidantd.jobs.measuring import SpeedMeasuring
from confidantd.jobs.peers import Handler, Peers
from confidantd.jobs.speed_book import SpeedBook
from confidantd.jobs.splits import Splits
from confidantd.jobs.stage_host import StageHost
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.spec import ProgramRequest
from confidantd.planner.explain import Explanation
from confidantd.planner.microbatches import NEARLY
from confidantd.planner.plan import Plan
from confidantd.store.blobs import BlobStore
from confidantd.swarm.state import CoordinatorView, PeerView
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    MAX_SHAPES,
    CurrentStage,
    KnownSpeeds,
    PlanRequest,
    SpeedsQuestion,
)
from confidantd.wire.resources import Resources
from confidantd.wire.speeds import Speeds
from tests.component.swarm_support import resources
from tests.unit.model_files import LLAMA

MEMORY = 8_000_000_000
LOW = "its battery is at 12 % (least_battery_percent = 20)"


async def no_link(device: DeviceId) -> float:
    """A device that can measure no link."""
    raise PeerLostError(f"the device {device[:4]} is not connected")


class Wire:
    """The transport of one device: calls the handlers of the others directly."""

    def __init__(self, me: DeviceId, wires: dict[DeviceId, Wire]) -> None:
        self._me = me
        self._wires = wires
        self._handlers: dict[str, Handler] = {}
        wires[me] = self

    def on_request(self, method: str, handler: Handler) -> None:
        self._handlers[method] = handler

    def on_notify(self, *_: Any) -> None:
        """Nobody is told anything here."""

    async def request(
        self, device: DeviceId, method: str, params: dict[str, Any], **_: float
    ) -> dict[str, Any]:
        if device not in self._wires:
            raise PeerLostError(f"the device {device[:4]} is not connected")
        handler = self._wires[device]._handlers.get(method)
        if handler is None:
            raise PeerLostError(f"{method} is not answered")
        return await handler(self._me, params)

    async def notify(self, *_: Any) -> bool:
        raise AssertionError("nobody is told")

    async def read_blob(self, *_: Any) -> bytes:
        raise AssertionError("nothing is fetched")


class Swarm:
    """Devices by name; the first one coordinates. `gossip` is what the others heard of each,
    `now` what is true there at this moment.
    """

    def __init__(self, folder: Path, names: str) -> None:
        self.ids = {name: DeviceId(name * 64) for name in names}
        self.gossip = {name: resources(2 * MEMORY) for name in names}
        self.now = dict(self.gossip)
        self.wires: dict[DeviceId, Wire] = {}
        self._peers = {name: Peers(id_, Wire(id_, self.wires)) for name, id_ in self.ids.items()}
        self.hosts = {name: self._host(folder / name, name) for name in names}
        self._first = CoordinatorView(self.ids[names[0]], names[0], 1)
        Coordinator(self._peers[names[0]], self, lambda: self._first)

    def _host(self, home: Path, name: str) -> StageHost:
        splits = Splits(home, 1, "never", tuple)
        return StageHost(
            self._peers[name], BlobStore(home / "store"), home, ("127.0.0.1",), 1,
            self._resources_of(name), lambda _: None, lambda: None, lambda: self._first.id, splits,
            SpeedBook(home, splits),
        )  # fmt: skip

    def _resources_of(self, name: str) -> Callable[[], Awaitable[Resources]]:
        async def now() -> Resources:
            return self.now[name]

        return now

    def peers(self) -> tuple[PeerView, ...]:
        return tuple(
            PeerView(
                self.ids[name], name, "alive", "", 1.0, found, self.ids[name] == self._first.id
            )
            for name, found in self.gossip.items()
        )

    def conflict(self) -> str | None:
        return None

    async def wait_for_coordinator(self, _: float) -> CoordinatorView:
        return self._first

    def refuse(self, *names: str, told: bool) -> None:
        """These are low on charge from now on; `told`: the others have heard it."""
        for name in names:
            self.now[name] = replace(self.now[name], refuses=LOW)
            if told:
                self.gossip[name] = self.now[name]

    def knows(self, name: str, *answers: Speeds | None) -> list[SpeedsQuestion]:
        """A device that measured blocks of some shapes; gives what it is asked."""
        asked: list[SpeedsQuestion] = []

        async def speeds(_: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
            asked.append(from_map(SpeedsQuestion, params))
            return to_map(KnownSpeeds(answers, MEMORY))

        self._peers[name].on_request("device.speeds", speeds)
        return asked

    async def ask(self, method: str, owner: str, *wanted: str, **fields: Any) -> Plan:
        request = PlanRequest(
            JobId("0123456789ab"), 1, "m", spec_from_config(Config(LLAMA, "config.json")), "train",
            "full", None, 4, fields.pop("microbatches", 4), 32, wanted, **fields,
        )  # fmt: skip
        wire = self.wires[self.ids[owner]]
        return from_map(
            Plan,
            await wire.request(self._first.id, method, to_map(request), timeout_seconds=10),
        )


async def three(folder: Path) -> Swarm:
    """Two slow devices and a fast one, which every plan wants."""
    made = await asyncio.to_thread(Swarm, folder, "abc")
    made.now["c"] = made.gossip["c"] = replace(made.gossip["c"], gflops=1e6)
    return made


def left(plan: Plan) -> Mapping[str, str]:
    return {device.name: device.reason for device in plan.left_out}


@pytest.mark.parametrize("method", ["job.plan", "job.negotiate"])
async def test_who_refuses_is_left_out_with_the_reason(tmp_path: Path, method: str) -> None:
    swarm = await three(tmp_path)
    used = await swarm.ask("job.plan", "a", "b", "c")
    assert {stage.name for stage in used.stages} == {"b", "c"}
    swarm.refuse("b", "c", told=True)
    plan = await swarm.ask(method, "a")
    assert [stage.name for stage in plan.stages] == ["a"]
    assert left(plan) == {"b": LOW, "c": LOW}


async def test_named_it_is_an_error_and_nothing_stays_granted(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    swarm.refuse("c", told=True)
    for method in ("job.plan", "job.negotiate"):
        with pytest.raises(DeviceError, match=r"c takes no part now: its battery is at 12 %"):
            await swarm.ask(method, "a", "a", "c")
    swarm.gossip["c"] = replace(swarm.gossip["c"], refuses="")  # the others know it too late
    with pytest.raises(DeviceError, match=r"c takes no part now: its battery is at 12 %"):
        await swarm.ask("job.negotiate", "a", "a", "c")
    assert [host.granted_bytes() for host in swarm.hosts.values()] == [0, 0, 0]


async def test_what_became_true_meanwhile_is_planned_around(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    before = await swarm.ask("job.plan", "a")
    assert "c" in [stage.name for stage in before.stages]
    swarm.refuse("c", told=False)
    plan = await swarm.ask("job.negotiate", "a")
    assert "c" not in [stage.name for stage in plan.stages]
    assert left(plan)["c"] == LOW
    granted = {name for name, host in swarm.hosts.items() if host.granted_bytes()}
    assert granted == {stage.name for stage in plan.stages}


async def test_a_device_that_left_is_not_said_to_lack_memory(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    del swarm.wires[swarm.ids["c"]]
    plan = await swarm.ask("job.negotiate", "a")
    assert left(plan)["c"] == "the device cccc is not connected"


async def test_the_owners_own_device_takes_its_own_jobs(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    swarm.refuse("c", told=True)
    plan = await swarm.ask("job.negotiate", "c")
    assert "c" in [stage.name for stage in plan.stages]
    assert "c" not in left(plan)


async def test_a_stage_that_runs_is_no_new_work(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    swarm.refuse("b", "c", told=True)
    current = (CurrentStage(swarm.ids["c"], 2, "saved", 1_000_000),)
    plan = await swarm.ask("job.plan", "a", current=current)
    assert "c" in [stage.name for stage in plan.stages]
    assert left(plan)["b"] == LOW
    assert "c" not in left(plan)


async def test_a_hostile_reason_is_one_short_line(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    swarm.gossip["c"] = replace(swarm.gossip["c"], refuses="no\n\x1b[2J" + "x" * 10_000)
    plan = await swarm.ask("job.plan", "a")
    assert left(plan)["c"].startswith("no[2Jxxx")
    assert len(left(plan)["c"]) <= 200


async def test_the_plan_cuts_the_batch_where_nobody_has_said_how(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    free = await swarm.ask("job.plan", "a", microbatches=0)
    assert free.microbatches * free.microbatch_size == 4
    kept = await swarm.ask("job.negotiate", "a", microbatches=free.microbatches)
    assert kept.microbatches == free.microbatches
    for count in (1, 2, 4):
        asked = await swarm.ask("job.plan", "a", microbatches=count)
        assert asked.microbatches == count
        assert asked.seconds * (1 + NEARLY) >= free.seconds
    with pytest.raises(UsageError, match="a batch of 4 cannot be cut into 3 microbatches"):
        await swarm.ask("job.plan", "a", microbatches=3)


async def test_what_was_measured_of_one_size_counts_for_all(tmp_path: Path) -> None:
    """A device that is fast by its GFLOP/s has shown with two sequences that it is slow."""
    swarm = await three(tmp_path)
    slow = Speeds(forward=1e3, backward=2e3, forward_again=1e3, backward_again=3e3)
    asked = swarm.knows("c", None, slow, None)  # of 1, 2 and 4 microbatches
    for count in (0, 1, 4):
        plan = await swarm.ask("job.plan", "a", microbatches=count)
        assert "c" not in [stage.name for stage in plan.stages]
    assert [request.microbatch_size for request in asked[0].requests] == [4, 2, 1]


async def test_only_a_plan_that_is_looked_at_is_explained(tmp_path: Path) -> None:
    swarm = await three(tmp_path)
    assert (await swarm.ask("job.plan", "a")).explanation == Explanation()
    said = (await swarm.ask("job.plan", "a", explain=True)).explanation
    assert [other.microbatches for other in said.other_counts] == [2]
    assert said.alternatives


async def test_a_device_says_what_it_knows_of_each_shape(tmp_path: Path) -> None:
    made = await asyncio.to_thread(Swarm, tmp_path, "a")
    book = SpeedBook(tmp_path / "a", Splits(tmp_path / "a", 1, "never", tuple))
    peers = Peers(made.ids["a"], made.wires[made.ids["a"]])
    store = await asyncio.to_thread(BlobStore, tmp_path / "store")
    SpeedMeasuring(peers, store, tmp_path, 1, book, made._resources_of("a"), no_link)
    model = spec_from_config(Config(LLAMA, "config.json"))
    one, two = (ProgramRequest.of(model, "full", None, rows, 32) for rows in (1, 2))
    known = Speeds(forward=1.0, backward=2.0)
    await asyncio.to_thread(book.remember, two, known)
    wire = made.wires[made.ids["a"]]
    question = to_map(SpeedsQuestion((one, two)))
    answer = from_map(KnownSpeeds, await wire.request(made.ids["a"], "device.speeds", question))
    assert answer.speeds == (None, known)
    many = to_map(SpeedsQuestion((one,) * (MAX_SHAPES + 1)))
    with pytest.raises(ProtocolError, match="more than 32 shapes"):
        await wire.request(made.ids["a"], "device.speeds", many)
