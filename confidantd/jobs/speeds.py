"""How fast this device is with blocks of each shape: measured once, corrected by every step."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confidantd.errors import ConfidantError, DeviceError, ProtocolError, StorageError
from confidantd.ids import DeviceId
from confidantd.jobs.peers import Peers
from confidantd.jobs.plan_inputs import assignment_workload
from confidantd.jobs.programs import fetch_programs
from confidantd.jobs.splits import Splits, program_request
from confidantd.jobs.subprocesses import run_module
from confidantd.models.spec import Form, ProgramRequest
from confidantd.models.tensors import embedding_parameters
from confidantd.planner.costs import PlanDevice, assumed_speeds, stage_cost
from confidantd.planner.speeds import corrected, scaled, valid, with_block
from confidantd.store.blobs import BlobStore
from confidantd.store.files import write_atomically
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
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import StepDone

_log = logging.getLogger(__name__)

MEASURE_SECONDS = 300.0  # a phone needs some ten seconds, and more for a block of 200 MB
ENDS_BYTES = 16  # a parameter of the head in full fine-tuning, while it is measured
FORMS: tuple[Form, ...] = ("saved", "recompute")


@dataclass(slots=True)
class _Live:
    """What running stages show, after so many steps."""

    speeds: Speeds
    steps: int = 0


class SpeedBook:
    """Speeds by shape, in files of a folder; those of running stages in memory too. Blocking."""

    def __init__(self, folder: Path, splits: Splits) -> None:
        self._folder = folder
        self._splits = splits
        self._live: dict[Path, _Live] = {}

    def known(self, request: ProgramRequest) -> Speeds | None:
        """What steps showed last, else what was measured; None if neither was."""
        file = self._file(request)
        live = self._live.get(file)
        if live is not None:
            return live.speeds
        try:
            found = json.loads(file.read_bytes())
            speeds = from_map(Speeds, found["speeds"])
        except (OSError, ValueError, KeyError, TypeError, ConfidantError):
            return None
        if not valid(speeds):
            return None
        return speeds if found.get("lived") else self._with_backends(request, speeds)

    def remember(self, request: ProgramRequest, speeds: Speeds, *, lived: bool = False) -> None:
        """Keep them; `lived`: running stages showed them."""
        file = self._file(request)
        data = json.dumps({"speeds": to_map(speeds), "lived": lived}).encode()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, data)
        except (OSError, StorageError) as failure:
            _log.warning("the speed of this device is not remembered: %s", failure)

    def begin(self, place: StageAssignment) -> None:
        """A stage begins to run here."""
        request = program_request(place.spec)
        known = self.known(request)
        if known is not None:
            self._live.setdefault(self._file(request), _Live(known))

    def observe(self, place: StageAssignment, step: StepDone) -> None:
        """It has done a step. Reads no file."""
        file, count = self._file(program_request(place.spec)), place.microbatches
        measured = step.computed_seconds / count
        live = self._live.get(file)
        if live is None:
            any_speed = assumed_speeds(assignment_workload(place), 1.0)
            right = scaled(any_speed, measured / _seconds(place, any_speed))
            live = self._live[file] = _Live(right)
        predicted = _seconds(place, live.speeds)
        live.speeds = corrected(live.speeds, predicted, measured, live.steps)
        live.steps += 1

    def save(self, place: StageAssignment) -> None:
        """A stage here has ended: keep what it showed."""
        request = program_request(place.spec)
        live = self._live.pop(self._file(request), None)
        if live is not None and live.steps:
            self.remember(request, live.speeds, lived=True)

    def _with_backends(self, request: ProgramRequest, speeds: Speeds) -> Speeds:
        """Where several backends share such blocks: what they take together."""
        for form in FORMS:
            answer = self._splits.answer(request, form)
            if answer.shares:
                speeds = with_block(speeds, answer.seconds, form)
        return speeds

    def _file(self, request: ProgramRequest) -> Path:
        return self._folder / self._splits.file(request, "saved").name


def _seconds(place: StageAssignment, speeds: Speeds) -> float:
    """What a stage takes for one microbatch by these speeds."""
    spec = place.spec
    device = PlanDevice(place.source, "", 0, 0.0, speeds=speeds)
    layers = spec.past_last_layer - spec.first_layer
    cost = stage_cost(
        assignment_workload(place), device, layers,
        head=spec.head, embedding=spec.embedding, form=spec.form,
    )  # fmt: skip
    return cost.forward + cost.backward


class SpeedMeasuring:
    """Answers `device.speeds`, `device.measure` and `device.link`."""

    def __init__(
        self,
        peers: Peers,
        store: BlobStore,
        home: Path,
        threads: int,
        book: SpeedBook,
        available_bytes: Callable[[], int],
        measure_link: Callable[[DeviceId], Awaitable[float]],
    ) -> None:
        self._peers = peers
        self._store = store
        self._home = home
        self._threads = threads
        self._book = book
        self._available_bytes = available_bytes
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

        return to_map(KnownSpeeds(await asyncio.to_thread(known)))

    async def _measure(self, _device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        message = from_map(Measure, params)
        async with self._one_at_a_time:
            known = await asyncio.to_thread(self._book.known, message.request)
            if known is not None:
                return to_map(SpeedsAnswer(known))
            try:
                async with asyncio.timeout(MEASURE_SECONDS):
                    found = await self._measured(message)
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

    async def _measured(self, message: Measure) -> Speeds:
        programs = await fetch_programs(self._peers, self._store, message.source, message.programs)
        ends = ENDS_BYTES * embedding_parameters(message.request.model)
        room = await asyncio.to_thread(self._available_bytes)
        question = {
            "request": to_map(message.request),
            "programs": {name: str(path) for name, path in programs.items()},
            "threads": self._threads,
            "ends": 2 * ends < room,
        }
        with tempfile.TemporaryDirectory(prefix="measure-", dir=self._home) as folder:
            asked, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
            asked.write_text(json.dumps(question))
            await run_module(
                "confidantd.engine.block_speed",
                [str(asked), str(answer)],
                self._home / "logs" / "measure.log",
                lambda _: None,
                DeviceError,
            )
            found = from_map(Speeds, json.loads(answer.read_bytes()))
        if not valid(found):
            raise DeviceError("what was measured cannot be", "see logs/measure.log")
        return found
