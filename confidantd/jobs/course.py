"""How many steps a training job takes, with which learning rates, over which blocks; pure."""

from __future__ import annotations

from dataclasses import dataclass

from confidantd.jobs.batches import BlockOrder, steps_per_epoch
from confidantd.jobs.learning_rate import default_warmup_steps, learning_rate
from confidantd.jobs.options import TrainOptions


@dataclass(frozen=True, slots=True)
class Course:
    """How many steps, with which learning rates, over which blocks."""

    steps: int
    warmup_steps: int
    schedule: str
    peak: float
    order: BlockOrder
    batch_size: int
    sequence_length: int
    eval_every: int | None

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate(self.schedule, step, self.steps, self.warmup_steps, self.peak)

    def evaluates_after(self, steps_done: int) -> bool:
        """Whether the held-out loss is taken now; always before the first and after the last."""
        if steps_done in (0, self.steps):
            return True
        return self.eval_every is not None and steps_done % self.eval_every == 0


def make_course(options: TrainOptions, blocks: int, sequence_length: int) -> Course:
    """The course of a job over that many blocks."""
    order = BlockOrder(blocks, options.batch_size, options.seed, options.shuffle)
    steps = options.steps
    if steps is None:
        steps = (options.epochs or 1) * steps_per_epoch(blocks, options.batch_size)
    warmup = options.warmup_steps
    if warmup is None:
        warmup = default_warmup_steps(options.schedule, steps)
    return Course(
        steps=steps,
        warmup_steps=warmup,
        schedule=options.schedule,
        peak=options.peak_learning_rate,
        order=order,
        batch_size=options.batch_size,
        sequence_length=sequence_length,
        eval_every=options.eval_every,
    )
