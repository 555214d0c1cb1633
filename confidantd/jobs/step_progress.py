"""Counts the steps that every stage has applied, and says how fast they come."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from confidantd.jobs.course import Course
from confidantd.jobs.job_plans import Launched
from confidantd.jobs.record import JobLog
from confidantd.wire.worker import StepDone

SPEED_WINDOW_STEPS = 10


@dataclass(slots=True)
class StepProgress:
    """Counts steps that every stage has applied, and says how fast they come."""

    launched: Launched
    course: Course
    log: JobLog
    kept: Callable[[], dict[str, Any] | None]  # the newest checkpoint
    done: int = 0
    last_loss: float | None = None
    _answers: dict[int, dict[int, StepDone]] = field(default_factory=dict)
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW_STEPS + 1))
    _busy: dict[int, float] = field(default_factory=dict)
    _wall: dict[int, float] = field(default_factory=dict)
    _backends: dict[int, dict[str, float]] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)  # of every step
    _last_step: dict[int, StepDone] = field(default_factory=dict)

    def adopt(self, launched: Launched) -> None:
        """Count for another pipeline of the job from now on; what is shown at the end is its."""
        self.launched = launched
        for found in (self._busy, self._wall, self._backends, self._last_step):
            found.clear()
        self._seconds.clear()
        self._times.clear()

    def go_back(self, steps: int) -> None:
        """Later steps are done again."""
        self.done = steps
        self._answers.clear()

    def step_done(self, stage: int, event: StepDone) -> dict[int, StepDone] | None:
        """Take one stage's report; with the last of them emits the `step` event and gives all."""
        if not self._times:
            self._times.append(time.monotonic() - event.wall_seconds)
        self._busy[stage] = self._busy.get(stage, 0.0) + event.busy_seconds
        self._wall[stage] = self._wall.get(stage, 0.0) + event.wall_seconds
        backends = self._backends.setdefault(stage, {})
        for name, seconds in event.backend_seconds.items():
            backends[name] = backends.get(name, 0.0) + seconds
        answers = self._answers.setdefault(event.step, {})
        answers[stage] = event
        if len(answers) < len(self.launched.pipeline):
            return None
        del self._answers[event.step]
        self._committed(event.step, answers)
        return answers

    def busy_fractions(self) -> dict[int, float]:
        """Each stage's busy share over the whole job."""
        return {
            stage: round(self._busy[stage] / max(self._wall[stage], 1e-9), 4)
            for stage in sorted(self._wall)
        }

    def backends(self, stage: int) -> list[dict[str, Any]]:
        """Who computed a stage's blocks last, each with its busy share over the whole job."""
        seconds, wall = self._backends.get(stage, {}), max(self._wall.get(stage, 0.0), 1e-9)
        return _with_shares(self.launched.pipeline.notes.backends(stage), seconds, wall)

    def step_seconds(self) -> dict[str, float | None]:
        """Predicted by the plan, and measured: the median without the first step, which also
        fills memory.
        """
        seconds = self._seconds[1:] or self._seconds
        measured = round(statistics.median(seconds), 6) if seconds else None
        return {"predicted": self.launched.plan.seconds, "measured": measured}

    def timeline(self) -> list[list[dict[str, Any]]]:
        """What each stage computed when in the last step, by its own clock."""
        return [
            [asdict(span) for span in self._last_step[stage].spans]
            for stage in sorted(self._last_step)
        ]

    def _committed(self, step: int, answers: dict[int, StepDone]) -> None:
        self.done = step + 1
        self._last_step = dict(answers)
        self._seconds.append(max(answer.wall_seconds for answer in answers.values()))
        self._times.append(time.monotonic())
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        tokens = self.course.batch_size * self.course.sequence_length
        self.last_loss = answers[len(answers) - 1].loss
        self.log.record.step = self.done
        self.log.emit(
            {
                "event": "step",
                "step": self.done,
                "steps": self.course.steps,
                "loss": self.last_loss,
                "gradient_norm": answers[0].gradient_norm,
                "learning_rate": self.course.learning_rate(step),
                "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
                "seconds_left": round(seconds * (self.course.steps - self.done), 1),
                "epoch": self.log.record.epoch,
                "stages": self._stage_shares(answers),
                "checkpoint": self.kept(),
            }
        )

    def _stage_shares(self, answers: dict[int, StepDone]) -> list[dict[str, Any]]:
        return [
            {
                "device": stage.device,
                "name": stage.name,
                "busy_fraction": round(
                    answers[i].busy_seconds / max(answers[i].wall_seconds, 1e-9), 4
                ),
                "backends": _with_shares(
                    self.launched.pipeline.notes.backends(i),
                    answers[i].backend_seconds,
                    max(answers[i].wall_seconds, 1e-9),
                ),
            }
            for i, stage in enumerate(self.launched.plan.stages)
        ]


def _with_shares(
    backends: list[dict[str, Any]], seconds: Mapping[str, float], wall_seconds: float
) -> list[dict[str, Any]]:
    """The backends of a stage with their busy shares, where there are several."""
    if not seconds:
        return backends
    return [
        {**b, "busy_fraction": round(seconds.get(b["name"], 0.0) / wall_seconds, 4)}
        for b in backends
    ]
