"""The life of one stage worker: load, connect, obey commands, report events."""

from __future__ import annotations

import asyncio
import os
from typing import assert_never

from confidantd.allocator import give_back_freed
from confidantd.engine.generation.stage import GeneratingStage
from confidantd.engine.train_stage import TrainStage
from confidantd.errors import (
    ConfidantError,
    PeerLostError,
    ProtocolError,
    StaleEpochError,
    StorageError,
)
from confidantd.tasks import TaskSet, plain_errors
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import (
    Collect,
    Command,
    Connect,
    Connected,
    Decode,
    Evaluate,
    Export,
    Failed,
    Halt,
    Interrupted,
    Listening,
    Load,
    Loaded,
    Snapshot,
    Snapshotted,
    Stop,
    TrainStep,
)
from confidantd.worker.backends import PipeReport
from confidantd.worker.control import ControlPipe
from confidantd.worker.exchange import Exchange
from confidantd.worker.generator import Generator
from confidantd.worker.links import Links
from confidantd.worker.memory import (
    MEGABYTE,
    MemoryWatch,
    memory_bytes,
    too_large,
)
from confidantd.worker.results import write_snapshot, write_states, write_trained
from confidantd.worker.stages import (
    become,
    make_generating_stage,
    make_links,
    make_train_stage,
    partners,
)
from confidantd.worker.trainer import Trainer

MAX_WAITING_COMMANDS = 64


class StageWorker:
    """One stage of one job in one epoch; may only be run once."""

    def __init__(self, pipe: ControlPipe) -> None:
        self._pipe = pipe
        self._tasks = TaskSet("worker")
        self._commands: asyncio.Queue[Command] = asyncio.Queue(MAX_WAITING_COMMANDS)
        self._watch = MemoryWatch(0, self._used_too_much)
        self._place: StageAssignment | None = None
        self._exchange: Exchange | None = None

    async def run(self) -> int:
        """Obey commands until `Stop` or until the daemon is gone; gives the exit status."""
        reading = self._tasks.start(self._read_commands(), "commands")
        serving = self._tasks.start(plain_errors(self._load_and_serve()), "serve")
        try:
            await asyncio.wait({reading, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        except ConfidantError as failure:
            self._pipe.send(Failed(**failure.to_wire()))
            return 1
        except MemoryError:
            refused = too_large(self._place, memory_bytes(), "and the system gives no more")
            self._pipe.send(Failed(**refused.to_wire()))
            return 1
        finally:
            await self._tasks.close()
            self._watch.stop()
        return 0

    def _used_too_much(self, used_bytes: int) -> None:
        """On the thread of the watch: say so and end at once, whatever is computed now."""
        bound = f"and may use {self._watch.limit_bytes / MEGABYTE:.0f} MB"
        self._pipe.send(Failed(**too_large(self._place, used_bytes, bound).to_wire()))
        os._exit(1)

    async def _read_commands(self) -> None:
        """Queue commands until the daemon is gone, which ends the worker at once.

        A new place ends the step that is under way: it waits for stages that have gone.
        """
        while (command := await self._pipe.receive()) is not None:
            if isinstance(command, Load) and self._exchange is not None:
                self._exchange.links.fail(StaleEpochError("the job is in another epoch now"))
            await self._commands.put(command)

    async def _load_and_serve(self) -> None:
        load = await self._commands.get()
        if not isinstance(load, Load):
            raise ProtocolError("the first command of a worker must be Load")
        self._place, self._watch.limit_bytes = load.assignment, load.memory_limit_bytes
        self._watch.start()
        exchange = self._exchange = Exchange(make_links(load), load.turns_file)
        try:
            self._pipe.send(Listening(await exchange.links.listen(load.hosts)))
            await self._serve(load, exchange)
        finally:
            await exchange.links.close()

    async def _serve(self, load: Load, exchange: Exchange) -> None:
        try:
            if load.assignment.spec.training is None:
                await self._serve_generation(load, exchange)
            else:
                await self._serve_training(load, exchange)
        finally:
            exchange.close()

    async def _serve_training(self, load: Load, exchange: Exchange) -> None:
        stage = await exchange.compute(make_train_stage, load, PipeReport(self._pipe.send))
        try:
            await self._train(load.assignment, stage, exchange)
        finally:
            stage.close()

    async def _train(self, place: StageAssignment, stage: TrainStage, exchange: Exchange) -> None:
        self._pipe.send(Loaded(dict(stage.resident_bytes())))
        trainer = Trainer(place, stage, exchange)
        interrupted = False
        while not isinstance(command := await self._commands.get(), Stop):
            if isinstance(command, Load):
                await self._become(command, stage, exchange)
                trainer = Trainer(command.assignment, stage, exchange)
                interrupted = False
            elif not interrupted:  # the others are of an epoch that is over
                try:
                    await self._obey(command, trainer, stage, exchange)
                except (PeerLostError, StaleEpochError) as failure:
                    interrupted = True
                    await exchange.links.close()  # so that the other stages know, too
                    await exchange.compute(stage.abandon)
                    self._pipe.send(Interrupted(**failure.to_wire()))

    async def _obey(
        self, command: Command, trainer: Trainer, stage: TrainStage, exchange: Exchange
    ) -> None:
        match command:
            case Connect():
                await self._connect(command, trainer.place, exchange.links)
            case TrainStep():
                self._pipe.send(await trainer.step(command))
            case Evaluate():
                evaluated = await trainer.evaluate(command)
                if evaluated is not None:
                    self._pipe.send(evaluated)
            case Collect():
                self._pipe.send(await exchange.compute(write_trained, stage, command.folder))
            case Export():
                self._pipe.send(await exchange.compute(write_states, stage, command))
            case Snapshot():
                self._pipe.send(await self._snapshot(command, stage, exchange))
            case Load() | Decode() | Halt() | Stop():
                raise ProtocolError(f"a training stage cannot do {type(command).__name__} now")
            case _:
                assert_never(command)

    async def _snapshot(
        self, command: Snapshot, stage: TrainStage, exchange: Exchange
    ) -> Snapshotted:
        """Without room for it on the disk, training goes on as before."""
        try:
            return await exchange.compute(write_snapshot, stage, command)
        except StorageError as failure:
            return Snapshotted(command.steps, (), str(failure))

    async def _become(self, load: Load, stage: TrainStage, exchange: Exchange) -> None:
        """Go on as another stage, with new links: frames of the last epoch find none of them."""
        # the larger of both limits until what the old stage leaves is given back
        self._watch.limit_bytes = _larger_limit(self._watch.limit_bytes, load.memory_limit_bytes)
        await exchange.links.close()
        exchange.links = make_links(load)
        self._pipe.send(Listening(await exchange.links.listen(load.hosts)))
        await exchange.compute(become, stage, load, PipeReport(self._pipe.send))
        await exchange.compute(give_back_freed)
        self._place, self._watch.limit_bytes = load.assignment, load.memory_limit_bytes
        self._pipe.send(Loaded(dict(stage.resident_bytes())))

    async def _serve_generation(self, load: Load, exchange: Exchange) -> None:
        report = PipeReport(self._pipe.send)
        stage = await exchange.compute(make_generating_stage, load, report)
        try:
            await self._generate(load.assignment, stage, exchange)
        finally:
            await exchange.compute(stage.close)  # after what it computes now

    async def _generate(
        self, place: StageAssignment, stage: GeneratingStage, exchange: Exchange
    ) -> None:
        self._pipe.send(Loaded({}))
        generator = Generator(place, stage, exchange, self._pipe.send)
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(generator.serve(), name="generator")
            while not isinstance(command := await self._commands.get(), Stop):
                match command:
                    case Connect():
                        await self._connect(command, place, exchange.links)
                    case Decode():
                        generator.start(command)
                    case Halt():
                        generator.halt(command.sequence)
                    case _:
                        raise ProtocolError(
                            f"a generating stage cannot do {type(command).__name__}"
                        )
            serving.cancel()

    async def _connect(self, command: Connect, place: StageAssignment, links: Links) -> None:
        await links.connect({a.stage: a for a in command.stages}, partners(place))
        self._pipe.send(Connected())


def _larger_limit(first: int, second: int) -> int:
    """0 is no limit."""
    return max(first, second) if first and second else 0
