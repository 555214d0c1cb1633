"""Measures blocks and links when a job asks for it."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from confidantd.errors import ConfidantError, DeviceError, ProtocolError
from confidantd.ids import DeviceId
from confidantd.jobs.peers import Peers
from confidantd.jobs.programs import fetch_programs
from confidantd.jobs.speed_book import SpeedBook
from confidantd.jobs.subprocesses import run_module
from confidantd.models.quantisation import block_bytes
from confidantd.models.spec import ProgramRequest
from confidantd.models.tensors import block_parameters, embedding_parameters
from confidantd.planner.speeds import measured_blocks, measured_decode_blocks, valid
from confidantd.store.blobs import BlobStore
from confidantd.store.files import storage_error
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import (
    MAX_SHAPES,
    KnownSpeeds,
    LinkAnswer,
    Measure,
    MeasureLink,
    SpeedsAnswer,
    SpeedsQuestion,
)
from confidantd.wire.resources import Resources
from confidantd.wire.speeds import Speeds

MEASURE_SECONDS = 300.0  # a phone needs some ten seconds, and more for a block of 200 MB
PACKING_COPIES = 2  # of quantised weights, while ONNX Runtime packs them
PARAMETER_BYTES = 20  # of full fine-tuning: weight, gradient, moments, and a quarter to spare


class SpeedMeasuring:
    """Answers `device.speeds`, `device.measure` and `device.link`."""

    def __init__(
        self,
        peers: Peers,
        store: BlobStore,
        home: Path,
        threads: int,
        book: SpeedBook,
        resources: Callable[[], Awaitable[Resources]],
        measure_link: Callable[[DeviceId], Awaitable[float]],
    ) -> None:
        self._peers = peers
        self._store = store
        self._home = home
        self._threads = threads
        self._book = book
        self._resources = resources
        self._measure_link = measure_link
        self._one_at_a_time = asyncio.Lock()  # two at once would measure each other
        peers.on_request("device.speeds", self._speeds)
        peers.on_request("device.measure", self._measure)
        peers.on_request("device.link", self._link)

    async def _speeds(self, _device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        question = from_map(SpeedsQuestion, params)
        if len(question.requests) > MAX_SHAPES:
            raise ProtocolError(f"more than {MAX_SHAPES} shapes in one question")

        def known() -> tuple[Speeds | None, ...]:
            return tuple(self._book.known(request) for request in question.requests)

        resources = await self._resources()
        return to_map(KnownSpeeds(await asyncio.to_thread(known), resources.available_bytes))

    async def _measure(self, device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        message = from_map(Measure, params)
        async with self._one_at_a_time:
            known = await asyncio.to_thread(self._book.known, message.request)
            if known is not None:
                return to_map(SpeedsAnswer(known))
            try:
                async with asyncio.timeout(MEASURE_SECONDS):
                    found = await self._measured(device, message)
            except TimeoutError:
                return to_map(SpeedsAnswer(None, f"not within {MEASURE_SECONDS:.0f} s"))
            except ConfidantError as failure:
                return to_map(SpeedsAnswer(None, failure.message))
            await asyncio.to_thread(self._book.remember, message.request, found)
            return to_map(SpeedsAnswer(await asyncio.to_thread(self._book.known, message.request)))

    async def _link(self, _device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        target = from_map(MeasureLink, params).target
        try:
            return to_map(LinkAnswer(await self._measure_link(target)))
        except ConfidantError:
            return to_map(LinkAnswer(None))

    async def _measured(self, device: DeviceId, message: Measure) -> Speeds:
        resources = await self._resources()
        room, model = resources.available_bytes, message.request.model
        if resources.refuses and device != self._peers.self_id:
            raise DeviceError(resources.refuses)
        if resources.granted_bytes:  # both would be slow, and both would say so
            raise DeviceError("it is at work for another job")
        if _measured_bytes(message.request) > room:
            raise DeviceError("it has no memory to measure blocks")
        programs = await fetch_programs(self._peers, self._store, message.source, message.programs)
        question = {
            "request": to_map(message.request),
            "programs": {name: str(path) for name, path in programs.items()},
            "threads": self._threads,
            "home": str(self._home),
            "device": self._peers.self_id,
            "ends": 2 * PARAMETER_BYTES * embedding_parameters(model) < room,
        }
        folder = await asyncio.to_thread(self._folder, question)
        try:
            return await self._run(folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _folder(self, question: dict[str, Any]) -> Path:
        """A new folder with the question in it."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="measure-", dir=self._home))
            (folder / "question.json").write_text(json.dumps(question))
        except OSError as failure:
            raise storage_error(self._home, failure) from None
        return folder

    async def _run(self, folder: Path) -> Speeds:
        answer = folder / "answer.json"
        await run_module(
            "confidantd.worker.measure",
            [str(folder / "question.json"), str(answer)],
            self._home / "logs" / "measure.log",
            lambda _: None,
            DeviceError,
        )
        found = from_map(Speeds, json.loads(await asyncio.to_thread(answer.read_bytes)))
        if not valid(found):
            raise DeviceError("what was measured cannot be", "see logs/measure.log")
        return found


def _measured_bytes(request: ProgramRequest) -> int:
    """Of the blocks that are measured together."""
    model, parameters = request.model, block_parameters(request.model)
    if request.purpose == "train":
        return PARAMETER_BYTES * measured_blocks(model.layers, parameters) * parameters
    held = block_bytes(model)
    return PACKING_COPIES * measured_decode_blocks(model.layers, held) * held
