"""The fencing of a job's epochs, over random failures: a committed step is right, and never lost.

A model of the protocol around the devices' real book of promises. Commands and events are queues,
one each way and device, so that late ones arrive in later epochs; devices and the owner are killed
at any moment, workers too, connections break. The owner may begin a new epoch at any time, also
when nothing is wrong, over any devices that it reaches.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from confidantd.errors import ConfidantError
from confidantd.ids import DeviceId, JobId
from confidantd.jobs.grants import Grants, Place
from confidantd.wire.jobs import Offer

JOB, OWNER, LAYERS, STEPS = JobId("j" * 16), DeviceId("o" * 64), 4, 400
ACTIONS = 60  # in a row
FAULTS = ("device", "worker", "connection", "owner")
DEVICES = tuple(DeviceId(letter * 64) for letter in "abc")
Layer = tuple[int, ...]  # the steps that were applied to it, in order
State = dict[int, Layer]  # by layer


@dataclass
class Worker:
    """What a stage holds; a step that does not follow its last one would spoil it."""

    state: State
    snapshots: dict[int, State] = field(default_factory=dict)

    def step(self, step: int) -> bool:
        """Apply it."""
        if any(len(done) != step for done in self.state.values()):
            return False  # its neighbours' frames would be of another step: it waits for ever
        self.state = {layer: (*done, step) for layer, done in self.state.items()}
        return True


class Device:
    """Its promises and its workers, gone when it is killed."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Nothing is remembered."""
        self.grants = Grants()
        self.commands: deque[tuple[int, int, str, int]] = deque()  # epoch, stage, what, step
        self.events: deque[tuple[int, int, str, int, State]] = deque()

    def disconnect(self) -> None:
        """What was on its way is lost, and stages whose owner is gone end."""
        self.commands.clear()
        self.events.clear()
        for held in self.grants.of_owner(OWNER):
            self.grants.remove(held)

    def obey(self) -> None:
        """The next command, if it is of an epoch that runs here."""
        epoch, stage, what, step = self.commands.popleft()
        try:
            held = self.grants.find(OWNER, Place(JOB, epoch, stage))
        except ConfidantError:
            return
        worker = cast("Worker | None", held.process)
        if worker is None:
            return
        if what == "step" and worker.step(step):
            self.events.append((epoch, stage, "done", step, {}))
        if what == "snapshot" and all(len(d) == step for d in worker.state.values()):
            worker.snapshots[step] = dict(worker.state)
            self.events.append((epoch, stage, "snapshot", step, dict(worker.state)))


@dataclass
class Pipeline:
    """What the owner knows of a running epoch; gone when its daemon is killed."""

    epoch: int
    stages: list[tuple[DeviceId, range]]
    fed: int
    snapshot: int | None = None
    parts: dict[int, State] = field(default_factory=dict)


class JobUnderFaults(RuleBasedStateMachine):
    """One job, three devices."""

    @initialize()
    def begin(self) -> None:
        """Nothing is trained, nothing runs."""
        self.devices = {device: Device() for device in DEVICES}
        self.cut: set[DeviceId] = set()
        self.epoch, self.committed_epoch = 0, 0
        self.committed: State = dict.fromkeys(range(LAYERS), ())
        self.most = 0
        self.pipeline: Pipeline | None = None

    def reachable(self) -> list[DeviceId]:
        """Devices without a broken link to the owner."""
        return [device for device in DEVICES if device not in self.cut]

    @rule(seed=st.integers(0, 1 << 32))
    def turmoil(self, seed: int) -> None:
        """Many things, most of them work."""
        chance = random.Random(seed)
        for _ in range(ACTIONS):
            device = chance.choice(DEVICES)
            match chance.choices(
                ("feed", "work", "well", "epoch", "fault"), weights=(5, 10, 1, 1, 0.5)
            )[0]:
                case "feed" if self.pipeline is not None:
                    self.feed(self.pipeline, snapshot=chance.random() < 0.6)
                case "work":
                    self.obey(device, chance.randrange(6))
                    self.hear(device, chance.randrange(4))
                case "well":
                    self.all_goes_well()
                case "epoch":
                    self.new_epoch(chance)
                case "fault":
                    self.fault(device, chance.choice(FAULTS))
            self.every_committed_step_is_there_once()

    def new_epoch(self, chance: random.Random) -> None:
        """Durable before anybody hears of it; then each stage is offered and started, unless one
        device fails in between.
        """
        there = self.reachable()
        if not there:
            return
        self.epoch += 1
        chosen = chance.sample(there, chance.randint(1, len(there)))
        cuts = sorted(chance.sample(range(1, LAYERS), len(chosen) - 1))
        borders = [0, *cuts, LAYERS]
        stages = [
            (device, range(first, past_last))
            for device, first, past_last in zip(chosen, borders, borders[1:], strict=False)
        ]
        before, self.pipeline = self.pipeline, None
        steps = len(self.committed[0])
        for index, (device, layers) in enumerate(stages):
            if chance.random() < 0.1:
                return  # it fails in between: another epoch has to come
            self.start(device, index, len(stages), layers, before, steps)
        self.pipeline = Pipeline(self.epoch, stages, steps)
        for device in self.devices.values():  # those that did not go on
            for held in device.grants.before(OWNER, JOB, self.epoch):
                device.grants.remove(held)

    def start(
        self, device: DeviceId, index: int, stages: int, layers: range,
        before: Pipeline | None, steps: int,
    ) -> None:  # fmt: skip
        """A stage goes on from a running one where there is one, else it is new; either way it goes
        back to the committed step.
        """
        grants = self.devices[device].grants
        held_before = [i for i, (d, _) in enumerate(before.stages) if d == device] if before else []
        goes_on = held_before[0] if held_before else None
        offer = Offer(
            JOB, self.epoch, 1, OWNER, index, stages, layers.start, layers.stop, 1, goes_on
        )
        try:
            grants.grant(offer, OWNER, 0.0)
        except ConfidantError:  # it was restarted meanwhile
            offer = Offer(JOB, self.epoch, 1, OWNER, index, stages, layers.start, layers.stop, 1)
            grants.grant(offer, OWNER, 0.0)
        held = grants.starting(OWNER, Place(JOB, self.epoch, index))
        wanted = {layer: self.committed[layer] for layer in layers}
        worker = cast("Worker | None", held.process)
        own = worker.snapshots.get(steps, {}) if worker else {}
        state = {layer: own.get(layer, wanted[layer]) for layer in layers}
        assert state == wanted, "a device's own copy of a committed step is another one"
        kept = worker.snapshots if worker else {}
        held.process = cast("Any", Worker(state, dict(kept)))
        grants.started(held)

    def feed(self, pipeline: Pipeline, *, snapshot: bool) -> None:
        """A step to all stages, and perhaps a snapshot after it."""
        if pipeline.fed >= STEPS:
            return
        for index, (device, _) in enumerate(pipeline.stages):
            if device not in self.cut:
                commands = self.devices[device].commands
                commands.append((pipeline.epoch, index, "step", pipeline.fed))
                if snapshot and pipeline.snapshot is None:
                    commands.append((pipeline.epoch, index, "snapshot", pipeline.fed + 1))
        pipeline.fed += 1
        if snapshot and pipeline.snapshot is None:
            pipeline.snapshot, pipeline.parts = pipeline.fed, {}

    def obey(self, device: DeviceId, count: int) -> None:
        """A device works through so many commands."""
        for _ in range(min(count, len(self.devices[device].commands))):
            self.devices[device].obey()

    def hear(self, device: DeviceId, count: int) -> None:
        """The owner takes events; those of other epochs than the running one are nothing to it."""
        events = self.devices[device].events
        for _ in range(min(count, len(events))):
            epoch, stage, what, step, state = events.popleft()
            pipeline = self.pipeline
            if pipeline is None or pipeline.epoch != epoch or device in self.cut:
                continue
            if what == "snapshot" and pipeline.snapshot == step:
                pipeline.parts[stage] = state
                if len(pipeline.parts) == len(pipeline.stages):
                    self.commit(pipeline)

    def all_goes_well(self) -> None:
        """For a moment: everything arrives and is done."""
        for device in DEVICES:
            self.obey(device, 100)
            self.hear(device, 100)

    def commit(self, pipeline: Pipeline) -> None:
        """All parts of one step in one epoch."""
        assert pipeline.epoch >= self.committed_epoch, "an older epoch commits after a newer one"
        self.committed_epoch = pipeline.epoch
        self.committed = {k: v for part in pipeline.parts.values() for k, v in part.items()}
        pipeline.snapshot = None

    def fault(self, device: DeviceId, what: str) -> None:
        """Something breaks; a device that is killed is there again at once, and knows nothing."""
        match what:
            case "device":
                self.devices[device].restart()
            case "worker":
                for held in self.devices[device].grants:
                    self.devices[device].grants.remove(held)
            case "connection":  # the next time it heals
                self.devices[device].disconnect()
                self.cut ^= {device}
            case "owner":  # what was on its way may still arrive
                self.pipeline = None

    @invariant()
    def every_committed_step_is_there_once(self) -> None:
        """In all layers alike, and there are never fewer."""
        if not hasattr(self, "committed"):
            return
        assert set(self.committed) == set(range(LAYERS))
        steps = len(self.committed[0])
        assert all(done == tuple(range(steps)) for done in self.committed.values())
        assert steps >= self.most, "a committed step was lost"
        self.most = steps


TestJobUnderFaults = JobUnderFaults.TestCase
TestJobUnderFaults.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
