"""How fast this device is with blocks of each shape: measured once, corrected by every step."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from confidantd.errors import ConfidantError, StorageError
from confidantd.jobs.plan_inputs import assignment_workload
from confidantd.jobs.splits import Splits, program_request
from confidantd.models.spec import Form, ProgramRequest
from confidantd.planner.costs import PlanDevice, assumed_speeds, stage_cost
from confidantd.planner.speeds import corrected, scaled, valid, with_block
from confidantd.store.files import write_atomically
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import StageAssignment
from confidantd.wire.worker import StepDone

_log = logging.getLogger(__name__)

FORMAT = 3  # of the files; before it, quantised blocks were measured in the cache
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
        if found.get("format") != FORMAT or not valid(speeds):
            return None
        return speeds if found.get("lived") else self._with_backends(request, speeds)

    def remember(self, request: ProgramRequest, speeds: Speeds, *, lived: bool = False) -> None:
        """Keep them; `lived`: running stages showed them."""
        file = self._file(request)
        data = json.dumps({"format": FORMAT, "speeds": to_map(speeds), "lived": lived}).encode()
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
            right = scaled(any_speed, measured / _seconds(place, any_speed, step.busy))
            live = self._live[file] = _Live(right)
        predicted = _seconds(place, live.speeds, step.busy)
        live.speeds = corrected(live.speeds, predicted, measured, live.steps, step.busy)
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


def _seconds(place: StageAssignment, speeds: Speeds, busy: float) -> float:
    """How long a stage computes for one microbatch by these speeds. Of its messages, that share
    passes while it computes, and makes it slower; the others while it waits.
    """
    spec = place.spec
    speeds = replace(speeds, message=speeds.message * busy)
    device = PlanDevice(place.source, "", 0, 0.0, speeds=speeds)
    layers = spec.past_last_layer - spec.first_layer
    cost = stage_cost(
        assignment_workload(place), device, layers,
        head=spec.head, embedding=spec.embedding, form=spec.form,
    )  # fmt: skip
    return cost.forward + cost.backward
