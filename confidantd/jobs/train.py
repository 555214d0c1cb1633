"""A training job on its owner's device: prepare, launch, feed steps, collect the result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confidantd.errors import ConfidantError, DataError, WorkerError
from confidantd.jobs.checkpoints import Checkpoint, Checkpoints
from confidantd.jobs.course import Course, make_course
from confidantd.jobs.job_plans import JobPlans, Launched
from confidantd.jobs.options import TrainOptions, check_files, check_output
from confidantd.jobs.output import OutputFolder, write_adapter, write_checkpoint
from confidantd.jobs.prepare import fingerprint
from confidantd.jobs.record import JobLog
from confidantd.jobs.recovery import Recovery
from confidantd.jobs.replication import Replication
from confidantd.jobs.services import JobServices, emit_progress
from confidantd.jobs.setup import Workload, train_workload
from confidantd.jobs.step_loop import StepLoop
from confidantd.jobs.step_progress import StepProgress
from confidantd.jobs.subprocesses import run_module
from confidantd.jobs.training_data import TokenBlocks
from confidantd.wire.stage import OptimizerSpec
from confidantd.wire.worker import (
    Collect,
    Collected,
    TrainedTensor,
)


class TrainJob:
    """One `confidant train`; may only be run once."""

    def __init__(
        self, options: TrainOptions, log: JobLog, services: JobServices, *, resumed: bool = False
    ) -> None:
        self._options, self._resumed = options, resumed
        self._log = log
        self._services = services
        self._checkpoints = Checkpoints(log.folder, services.store, services.self_id)

    async def run(self) -> None:
        """Train and write the output; emits every event but `failed`."""
        folder = self._log.folder
        options = await self._services.importer.with_folder(self._options, self._log)
        workload = await asyncio.to_thread(check_training, options, resumed=self._resumed)
        await self._prepare(folder / "train", options.data, workload)
        if options.eval_data is not None:
            await self._prepare(folder / "eval", (options.eval_data,), workload)
        with TokenBlocks(folder / "train") as blocks:
            course = make_course(options, blocks.count, blocks.sequence_length)
            self._log.record.steps = course.steps
            optimizer = OptimizerSpec(weight_decay=options.weight_decay)
            plans = JobPlans(
                self._services, self._log, workload, options.devices, optimizer, options.seed
            )
            await self._train(plans, course, blocks)
        await asyncio.to_thread(self._checkpoints.remove)

    async def _train(self, plans: JobPlans, course: Course, blocks: TokenBlocks) -> None:
        """All steps, over as many plans as it takes, and the output."""
        log, options, workload = self._log, self._options, plans.workload
        committed = await asyncio.to_thread(self._checkpoints.newest)
        facts = {
            "job": log.record.id,
            "text": await asyncio.to_thread(blocks.digest),
            "model": await fingerprint(self._services, log, workload),
        }
        if committed is not None:
            await asyncio.to_thread(self._check_same, committed, facts)
        replication = Replication(
            self._services, log, workload, self._checkpoints, facts, committed
        )
        recovery = Recovery(plans)
        try:
            if self._resumed:
                launched = await recovery.resume(committed)
            else:
                launched = await recovery.begin()
            plans.make_do = True
            loop = StepLoop(
                plans,
                launched,
                log,
                course,
                blocks,
                log.folder / "eval",
                options,
                replication,
                recovery,
            )
            log.record.state = "running"
            await loop.begin()
            while True:
                try:
                    await loop.run()
                    await self._finish(loop.launched, workload, loop.progress)
                    return
                except ConfidantError as failure:
                    await loop.recover(failure)
        finally:
            await asyncio.shield(self._close(replication, plans))

    async def _close(self, replication: Replication, plans: JobPlans) -> None:
        """Whatever happened."""
        try:
            await replication.close()
        finally:
            await plans.close()

    def _check_same(self, checkpoint: Checkpoint, facts: Mapping[str, str]) -> None:
        """Steps over another text or model would be of no job at all."""
        before = self._checkpoints.facts(checkpoint)
        for name in ("text", "model"):
            if before.get(name) != facts[name]:
                raise DataError(
                    f"the {name} has changed since the job began", "start a new job with it"
                )

    async def _prepare(self, folder: Path, files: tuple[str, ...], workload: Workload) -> None:
        """Tokenise and pack the files in a subprocess (the tokenizer stays out of the daemon)."""
        if self._resumed and await asyncio.to_thread((folder / "dataset.json").is_file):
            return  # of the run before: the text itself may be gone
        await asyncio.to_thread(check_files, files)
        emit_progress(self._log, "prepare", 0, len(files))
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        request = {
            "model": str(workload.model.path),
            "files": list(files),
            "sequence_length": workload.sequence_length,
        }
        question = folder / "request.json"
        await asyncio.to_thread(question.write_text, json.dumps(request))
        await run_module(
            "confidantd.jobs.dataset",
            [str(question), str(folder)],
            self._services.home / "logs" / "dataset.log",
            lambda p: emit_progress(
                self._log, "prepare", int(p["done"]), int(p["of"]), str(p["progress"])
            ),
            DataError,
        )

    async def _finish(self, launched: Launched, workload: Workload, progress: StepProgress) -> None:
        emit_progress(self._log, "save", 0, 1)
        tensors, peaks = await self._collect(launched)
        done = self._summary(launched, progress, peaks)
        try:
            await asyncio.to_thread(self._write, workload, tensors, done)
        finally:
            await asyncio.to_thread(self._forget, tensors)
        emit_progress(self._log, "save", 1, 1)
        self._log.emit(done)

    def _summary(
        self, launched: Launched, progress: StepProgress, peaks: Mapping[int, int]
    ) -> dict[str, Any]:
        """The `done` event."""
        busy = progress.busy_fractions()
        return {
            "event": "done",
            "job": self._log.record.id,
            "output": self._options.output,
            "steps": progress.done,
            "final_loss": progress.last_loss,
            "step_seconds": progress.step_seconds(),
            "timeline": progress.timeline(),
            "stages": [
                {
                    "device": stage.device,
                    "name": stage.name,
                    "layers": [stage.first_layer, stage.past_last_layer],
                    "peak_memory_bytes": peaks[index],
                    "busy_fraction": busy[index],
                    "backends": progress.backends(index),
                }
                for index, stage in enumerate(launched.plan.stages)
            ],
        }

    async def _collect(self, launched: Launched) -> tuple[dict[str, TrainedTensor], dict[int, int]]:
        """Trained tensors by name, fetched and verified, and each stage's peak memory."""
        pipeline = launched.pipeline
        await pipeline.broadcast(Collect())
        tensors: dict[str, TrainedTensor] = {}
        peaks: dict[int, int] = {}
        while len(peaks) < len(pipeline):
            stage, event = await pipeline.next_event()
            if not isinstance(event, Collected):
                continue
            peaks[stage] = event.peak_memory_bytes
            for tensor in event.tensors:
                await pipeline.fetch_trained(stage, tensor, self._services.store)
                tensors[tensor.name] = tensor
            emit_progress(self._log, "save", len(peaks), len(pipeline) + 1)
        if not tensors:
            raise WorkerError("no stage returned a trained tensor")
        return tensors, peaks

    def _forget(self, tensors: dict[str, TrainedTensor]) -> None:
        """The output holds the tensors now: their blobs would only fill the disk."""
        for tensor in tensors.values():
            if tensor.digest is not None:
                self._services.store.remove(tensor.digest)

    def _write(
        self, workload: Workload, tensors: dict[str, TrainedTensor], done: Mapping[str, Any]
    ) -> None:
        output, store = check_output(self._options.output), self._services.store
        model = workload.model.path
        with OutputFolder(output, self._log.folder, done) as folder:
            if workload.lora is not None:
                base = workload.model.source
                write_adapter(folder, base, workload.spec, workload.lora, tensors, store)
            else:
                write_checkpoint(folder, model, tensors, store)


def check_text(folder: Path, options: TrainOptions) -> None:
    """Of a job that is resumed, unless it was read already."""
    for name, files in (("train", options.data), ("eval", (options.eval_data,))):
        if not (folder / name / "dataset.json").is_file():
            check_files(tuple(file for file in files if file is not None))


def check_training(options: TrainOptions, *, resumed: bool = False) -> Workload:
    """Everything that can be refused before the job begins; reads the model's headers.

    The text of a job that is resumed may have been read already: who reads it then says so.
    """
    options.check()
    check_output(options.output)
    if not resumed:
        check_files(options.data)
        check_files(() if options.eval_data is None else (options.eval_data,))
    return train_workload(options)
