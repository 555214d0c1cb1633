"""Sends batches and evaluations to the ends of the pipeline, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from confidantd.jobs.course import Course
from confidantd.jobs.job_plans import Launched
from confidantd.jobs.options import TrainOptions
from confidantd.jobs.replication import Replication
from confidantd.jobs.training_data import TokenBlocks
from confidantd.wire.worker import Evaluate, Evaluated, TrainStep

EVALUATE_GROUPS = 32  # microbatches in one evaluation request


@dataclass(slots=True)
class _Evaluation:
    """A held-out loss being summed over its requests."""

    after_steps: int
    waiting: int
    loss_sum: float = 0.0
    count: int = 0


class Feeder:
    """Sends batches and evaluations to the ends of the pipeline, in order."""

    def __init__(
        self,
        launched: Launched,
        course: Course,
        blocks: TokenBlocks,
        eval_folder: Path,
        options: TrainOptions,
        replication: Replication,
    ) -> None:
        self._replication = replication
        self._pipeline = launched.pipeline
        self._specs = launched.specs
        self._course = course
        self._blocks = blocks
        self._eval_folder = eval_folder if options.eval_data is not None else None
        self._max_grad_norm = options.max_grad_norm
        self.fed = 0  # steps sent
        self._requests = 0
        self._evaluations: dict[int, _Evaluation] = {}
        self._evaluated = -1  # after that many steps, and answered
        self._evaluates = True  # before the next step

    @property
    def done(self) -> bool:
        """Whether every step has been sent."""
        return self.fed == self._course.steps

    @property
    def evaluations(self) -> int:
        """Evaluation requests that are not answered yet."""
        return len(self._evaluations)

    def adopt(self, launched: Launched) -> None:
        """Send to another pipeline of the job from now on."""
        self._pipeline, self._specs = launched.pipeline, launched.specs

    def go_back(self, steps: int) -> None:
        """Send again what comes after so many steps, and ask again what was not answered."""
        self.fed = steps
        self._evaluations.clear()
        self._evaluates = True

    async def feed_until(self, steps: int) -> None:
        """Send steps until `steps` of them, or all, have been sent."""
        await self._evaluate_if_due()
        while self.fed < min(steps, self._course.steps):
            await self._feed_step()
            await self._evaluate_if_due()

    async def _evaluate_if_due(self) -> None:
        wanted, self._evaluates = self._evaluates, False
        if wanted and self._evaluated < self.fed and self._course.evaluates_after(self.fed):
            await self._evaluate()

    async def _feed_step(self) -> None:
        course, step = self._course, self.fed
        tokens = self._blocks.batch(course.order.batch(step))
        positions = course.batch_size * (course.sequence_length - 1)
        for stage, spec in enumerate(self._specs):
            await self._pipeline.command(
                stage,
                TrainStep(
                    step=step,
                    learning_rate=course.learning_rate(step),
                    max_grad_norm=self._max_grad_norm,
                    scale=1.0 / positions,
                    tokens=tokens if spec.embedding else b"",
                    labels=tokens if spec.head else b"",
                ),
            )
        self.fed += 1
        self._evaluates = True
        if not self.done:  # after the last step comes the result
            await self._replication.after(self.fed)

    async def _evaluate(self) -> None:
        """Send the whole held-out text, forward only."""
        if self._eval_folder is None:
            return
        rows = self._specs[0].microbatch_size
        with TokenBlocks(self._eval_folder) as held_out:
            chunks = range(0, held_out.count, rows * EVALUATE_GROUPS)
            evaluation = _Evaluation(self.fed, len(chunks))
            for first in chunks:
                past_last = first + rows * EVALUATE_GROUPS
                tokens, labels, groups = held_out.padded(first, past_last, rows)
                self._requests += 1
                self._evaluations[self._requests] = evaluation
                for stage, spec in enumerate(self._specs):
                    await self._pipeline.command(
                        stage,
                        Evaluate(
                            request=self._requests,
                            microbatches=groups,
                            tokens=tokens if spec.embedding else b"",
                            labels=labels if spec.head else b"",
                        ),
                    )

    def evaluated(self, event: Evaluated) -> tuple[int, float] | None:
        """Take an answer; steps done and mean loss once the evaluation is complete."""
        evaluation = self._evaluations.pop(event.request, None)
        if evaluation is None:
            return None
        evaluation.waiting -= 1
        evaluation.loss_sum += event.loss_sum
        evaluation.count += event.count
        if evaluation.waiting:
            return None
        self._evaluated = evaluation.after_steps
        return evaluation.after_steps, evaluation.loss_sum / max(evaluation.count, 1)
