"""What stages say beside their work: notices, measurements, and who computes their blocks."""

from __future__ import annotations

from typing import Any

from confidantd.jobs.record import JobLog
from confidantd.planner.plan import Plan
from confidantd.wire.worker import Measuring, Notice, SplitChosen

Note = Notice | Measuring | SplitChosen


class StageNotes:
    """Turns notes into events of a job, and remembers the last split of each stage."""

    def __init__(self, log: JobLog, plan: Plan) -> None:
        self._log = log
        self._plan = plan
        self._measuring: dict[int, Measuring] = {}
        self._splits: dict[int, SplitChosen] = {}

    def add(self, stage: int, note: Note) -> None:
        """Take one note."""
        match note:
            case Notice():
                self._emit(stage, {"event": "notice", "code": note.code, "message": note.message})
            case Measuring():
                self._measuring[stage] = note
                done = sum(m.done for m in self._measuring.values())
                of = sum(m.of for m in self._measuring.values())
                progress = {"event": "progress", "phase": "measure", "done": done, "of": of}
                self._log.emit({**progress, "detail": "backends"})
            case SplitChosen():
                self._splits[stage] = note
                backends = self.backends(stage)
                fields = {"event": "backends", "backends": backends, "seconds": note.seconds}
                self._emit(stage, fields)

    def backends(self, stage: int) -> list[dict[str, Any]]:
        """The `backends` of a stage as in the contract."""
        split = self._splits.get(stage)
        if split is None:
            planned = self._plan.stages[stage]
            return [{"name": "cpu", "heads": planned.heads, "columns": planned.columns}]
        return [{"name": s.name, "heads": s.heads, "columns": s.columns} for s in split.shares]

    def _emit(self, stage: int, fields: dict[str, Any]) -> None:
        place = self._plan.stages[stage]
        self._log.emit({**fields, "device": place.device, "name": place.name})
