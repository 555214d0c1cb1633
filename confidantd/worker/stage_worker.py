"""The life of one stage worker: load, connect, obey commands, report events."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import assert_never

import numpy as np

from confidantd.engine.decode_stage import DecodeStage
from confidantd.engine.train_stage import TrainStage
from confidantd.errors import ConfidantError, ProtocolError, StorageError
from confidantd.tasks import TaskSet, plain_errors
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import (
    Collect,
    Collected,
    Command,
    Connect,
    Connected,
    Decode,
    Evaluate,
    Failed,
    Listening,
    Load,
    Loaded,
    Stop,
    TrainedTensor,
    TrainStep,
)
from confidantd.worker.backends import PipeReport, SplitFile, chosen_backends
from confidantd.worker.blobs import program_paths, reader
from confidantd.worker.control import ControlPipe
from confidantd.worker.exchange import Exchange
from confidantd.worker.generator import PREFILL_CHUNK_TOKENS, Generator
from confidantd.worker.links import Links
from confidantd.worker.memory import peak_memory_bytes
from confidantd.worker.trainer import Trainer, tied_partner

MAX_WAITING_COMMANDS = 64
# Given where blocks are large enough for several backends:
TRAIN_SPLIT_PROGRAM, DECODE_SPLIT_PROGRAM = "attention_forward", "attention_decode"


class StageWorker:
    """One stage of one job in one epoch; may only be run once."""

    def __init__(self, pipe: ControlPipe) -> None:
        self._pipe = pipe
        self._tasks = TaskSet("worker")
        self._commands: asyncio.Queue[Command] = asyncio.Queue(MAX_WAITING_COMMANDS)

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
            self._pipe.send(Failed("does-not-fit", "the stage ran out of memory", ""))
            return 1
        finally:
            await self._tasks.close()
        return 0

    async def _read_commands(self) -> None:
        """Queue commands until the daemon is gone, which ends the worker at once."""
        while (command := await self._pipe.receive()) is not None:
            await self._commands.put(command)

    async def _load_and_serve(self) -> None:
        load = await self._commands.get()
        if not isinstance(load, Load):
            raise ProtocolError("the first command of a worker must be Load")
        links = make_links(load)
        try:
            self._pipe.send(Listening(await links.listen(load.hosts)))
            await self._serve(load, links)
        finally:
            await links.close()

    async def _serve(self, load: Load, links: Links) -> None:
        exchange = Exchange(links)
        try:
            if load.assignment.spec.training is None:
                await self._serve_generation(load, exchange)
            else:
                await self._serve_training(load, exchange)
        finally:
            exchange.close()

    async def _serve_training(self, load: Load, exchange: Exchange) -> None:
        place = load.assignment
        report = PipeReport(self._pipe.send)
        stage = await exchange.compute(make_train_stage, load, report)
        try:
            await self._train(place, stage, exchange)
        finally:
            stage.close()

    async def _train(self, place: StageAssignment, stage: TrainStage, exchange: Exchange) -> None:
        self._pipe.send(Loaded(dict(stage.resident_bytes())))
        trainer = Trainer(place, stage, exchange)
        while True:
            match await self._commands.get():
                case Connect() as command:
                    await self._connect(command, place, exchange.links)
                case TrainStep() as command:
                    self._pipe.send(await trainer.step(command))
                case Evaluate() as command:
                    evaluated = await trainer.evaluate(command)
                    if evaluated is not None:
                        self._pipe.send(evaluated)
                case Collect() as command:
                    self._pipe.send(await exchange.compute(write_trained, stage, command.folder))
                case Stop():
                    return
                case Load() | Decode() as other:
                    raise ProtocolError(f"a training stage cannot do {type(other).__name__}")
                case other:
                    assert_never(other)

    async def _serve_generation(self, load: Load, exchange: Exchange) -> None:
        report = PipeReport(self._pipe.send)
        stage = await exchange.compute(make_decode_stage, load, report)
        try:
            await self._generate(load.assignment, stage, exchange)
        finally:
            await exchange.compute(stage.close)  # after what it computes now

    async def _generate(
        self, place: StageAssignment, stage: DecodeStage, exchange: Exchange
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
                        group.create_task(generator.start(command), name="sequence")
                    case _:
                        raise ProtocolError(
                            f"a generating stage cannot do {type(command).__name__}"
                        )
            serving.cancel()

    async def _connect(self, command: Connect, place: StageAssignment, links: Links) -> None:
        await links.connect({a.stage: a for a in command.stages}, partners(place))
        self._pipe.send(Connected())


def partners(place: StageAssignment) -> set[int]:
    """The stages this one exchanges tensors with: neighbours, and the other end where needed."""
    found = {s for s in (place.stage - 1, place.stage + 1) if 0 <= s < place.stages}
    ends = {0, place.stages - 1}
    if place.spec.training is None and place.stage in ends:
        found |= ends - {place.stage}  # the chosen token goes from the head to stage 0
    tied = tied_partner(place)
    return found if tied is None else found | {tied}


def make_links(load: Load) -> Links:
    """The links of a stage; no frame may be larger than the largest tensor of the schedule."""
    place, spec = load.assignment, load.assignment.spec
    rows = spec.microbatch_size * spec.sequence_length if spec.training else PREFILL_CHUNK_TOKENS
    largest = rows * spec.model.block.hidden
    if spec.model.tied and spec.training == "full":
        largest = max(largest, spec.model.vocabulary * spec.model.block.hidden)
    return Links(
        load.home, place.job, place.epoch, place.stage, place.stages, max_tensor_bytes=4 * largest
    )


def make_train_stage(load: Load, report: PipeReport) -> TrainStage:
    """Programs and weights of a training stage, and who computes its blocks."""
    place = load.assignment
    stage = TrainStage(
        place.spec,
        program_paths(place.programs, load.blobs),
        reader(place.tensors, load.blobs),
        reader(place.adapter_tensors, load.blobs) if place.adapter_tensors else None,
        place.threads,
    )
    if TRAIN_SPLIT_PROGRAM in place.programs:
        _schedule(stage, load, report)
    return stage


def make_decode_stage(load: Load, report: PipeReport) -> DecodeStage:
    """Programs and weights of a generating stage, and who computes its blocks."""
    place = load.assignment
    stage = DecodeStage(
        place.spec,
        program_paths(place.programs, load.blobs),
        reader(place.tensors, load.blobs),
        reader(place.adapter_tensors, load.blobs) if place.adapter_tensors else None,
        place.threads,
    )
    if DECODE_SPLIT_PROGRAM in place.programs:
        _schedule(stage, load, report)
    return stage


def _schedule(stage: TrainStage | DecodeStage, load: Load, report: PipeReport) -> None:
    if len(load.backends) > 1:
        backends = chosen_backends(load.backends, report)
        stage.schedule(backends, SplitFile(load.split_file), report, load.split)


def write_trained(stage: TrainStage, folder: str) -> Collected:
    """Write every trained tensor into a file of its own."""
    tensors = []
    for index, (name, array) in enumerate(stage.trained()):
        path = Path(folder) / f"{index}.f32"
        try:
            np.ascontiguousarray(array, dtype="<f4").tofile(path)
        except OSError as failure:
            raise StorageError(
                f"cannot write {name} to {path} ({failure.strerror})", "free some disk space"
            ) from None
        assert path.stat().st_size == 4 * math.prod(array.shape)
        tensors.append(TrainedTensor(name, tuple(array.shape), str(path)))
    return Collected(tuple(tensors), peak_memory_bytes())
