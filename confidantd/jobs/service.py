"""The jobs this device owns: started, listed, watched, cancelled."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from confidantd.errors import (
    CancelledJobError,
    ConfidantError,
    JobNotFoundError,
    ModelNotFoundError,
    OutputError,
    PeerLostError,
    StorageError,
    UsageError,
)
from confidantd.ids import JobId, new_job_id
from confidantd.jobs.checkpoints import FOLDER as CHECKPOINTS
from confidantd.jobs.generate import GenerateJob
from confidantd.jobs.options import (
    GenerateOptions,
    PlanOptions,
    ServeOptions,
    TrainOptions,
    model_folder,
    options_from,
)
from confidantd.jobs.output import done_event
from confidantd.jobs.record import FINAL_STATES, JobLog, JobRecord, Kind, State
from confidantd.jobs.serve import ServeJob
from confidantd.jobs.services import JobServices, ask_coordinator, failure_event
from confidantd.jobs.setup import planned_workload, serve_workload
from confidantd.jobs.timeline import timeline
from confidantd.jobs.train import TrainJob, check_text, check_training
from confidantd.jobs.what_if import plan_for
from confidantd.store.files import storage_error, write_atomically
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

FIRST_EPOCH = 1
MAX_REMEMBERED_JOBS = 200  # the oldest ended ones are forgotten, on disk too
PLAN_ONLY = JobId("plan")
REQUEST_NAME = "request.json"


class Jobs:
    """Jobs owned by this device. `Jobs.load` reads what earlier runs of the daemon left."""

    def __init__(self, services: JobServices, name: str) -> None:
        self._services = services
        self._name = name
        self._folder = services.home / "jobs"
        self._logs: dict[JobId, JobLog] = {}
        self._running: dict[JobId, asyncio.Task[None]] = {}
        self._served: dict[str, ServeJob] = {}
        self._tasks = TaskSet("jobs")
        self._resuming: set[JobId] = set()
        self._closing = False

    async def load(self) -> None:
        """Remember jobs of earlier runs; training that was running goes on, models are served
        again that shall be, the rest has failed.
        """
        for log in await asyncio.to_thread(_read_logs, self._folder):
            self._logs[log.record.id] = log
            if log.record.state in FINAL_STATES:
                continue
            try:
                done = await asyncio.to_thread(done_event, log.folder, log.record.output)
                if done is None:
                    await self._resume(log)
                else:
                    await self._finish(log, done)
            except (ConfidantError, OSError) as failure:
                _log.warning("job %s is not resumed: %s", log.record.id, failure)
                log.record.state = "failed"
                log.record.message = f"the daemon ended while the job ran ({failure})"
                await self._keep(log)

    async def _finish(self, log: JobLog, done: dict[str, Any]) -> None:
        """Of a job that was done but for saying so."""
        await log.reopen()
        log.record.state, log.record.message = "done", None
        if await log.last("done") is None:
            log.emit(done)
        log.close()
        await self._keep(log)

    def list(self) -> list[dict[str, Any]]:
        """Records, the newest first."""
        records = sorted((log.record for log in self._logs.values()), key=lambda r: -r.created)
        return [record.to_json() for record in records]

    def get(self, job: str) -> JobLog:
        """A job's log; `JobNotFoundError` if there is none."""
        log = self._logs.get(JobId(job))
        if log is None:
            raise JobNotFoundError(f"there is no job {job[:40]}", "see `confidant jobs`")
        return log

    async def timeline(self, job: str) -> dict[str, Any]:
        """What a picture of a job's step is drawn from: its plan, and the last step if it ended."""
        log = self.get(job)
        plan, done = await log.last("plan"), await log.last("done")
        if plan is None:
            raise JobNotFoundError(f"the job {job[:40]} has no plan yet", "wait until it runs")
        return timeline(plan, done)

    async def plan(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The plan that a job with these options would get now, or with the fleet of a file."""
        options = options_from(PlanOptions, request)
        options = await self._services.importer.with_folder(options)
        workload = await asyncio.to_thread(planned_workload, options)
        asked = workload.plan_request(PLAN_ONLY, FIRST_EPOCH, options.devices)
        asked = replace(asked, explain=True)
        if options.what_if is not None:
            return (await asyncio.to_thread(plan_for, options.what_if, asked)).to_json()
        return (await ask_coordinator(self._services, "job.plan", asked)).to_json()

    async def train(self, request: Mapping[str, Any]) -> JobLog:
        """Start training; what can be refused at once is raised here."""
        options = options_from(TrainOptions, request)
        found = await self._services.importer.with_folder(options)
        await asyncio.to_thread(check_training, found)
        self._check_free(options.output)
        log = self._new("train", options.model)
        log.record.output, log.lasts = options.output, True
        try:
            await asyncio.to_thread(_keep_request, log.folder, request)
        except ConfidantError:
            del self._logs[log.record.id]
            raise
        self._start(log, TrainJob(options, log, self._services).run)
        return log

    def _check_free(self, output: str) -> None:
        """Two jobs that write one folder: the second would fail after all its steps."""
        for number in self._running:
            if self._logs[number].record.output == output:
                raise OutputError(
                    f"the job {number} writes {output}", "give another folder to --output"
                )

    async def resume(self, job: str, output: str | None = None) -> JobLog:
        """Go on with a job that has failed, from its last checkpoint; with another `output`."""
        log = self.get(job)
        if log.record.id in self._running or log.record.id in self._resuming:
            raise UsageError(f"the job {job[:40]} is running", f"`confidant jobs watch {job[:40]}`")
        if log.record.state != "failed":
            raise UsageError(f"the job {job[:40]} is {log.record.state}", "start a new one")
        await self._resume(log, output)
        return log

    async def _resume(self, log: JobLog, output: str | None = None) -> None:
        """ConfidantError if that cannot be; then the record is as it was."""
        if log.record.kind == "generate":
            raise UsageError("a generated text is not resumed", "start it again")
        before = log.record.state, log.record.message
        self._resuming.add(log.record.id)
        try:
            if log.record.kind == "serve":
                await self._serve_again(log)
                return
            request = await asyncio.to_thread(_kept_request, log.folder)
            if output is not None:
                request["output"] = log.record.output = output
            options = options_from(TrainOptions, request)
            found = await self._services.importer.with_folder(options)
            await asyncio.to_thread(check_training, found, resumed=True)
            await asyncio.to_thread(check_text, log.folder, options)
            self._check_free(options.output)
            await asyncio.to_thread(_keep_request, log.folder, request)
            await log.reopen()
            log.lasts = True
            log.record.state, log.record.message = "recovering", None
            await log.save()
            self._start(log, TrainJob(options, log, self._services, resumed=True).run)
        except BaseException:
            log.record.state, log.record.message = before
            log.close()
            raise
        finally:
            self._resuming.discard(log.record.id)

    async def _serve_again(self, log: JobLog) -> None:
        """By the daemon's next run, or after it failed."""
        options = options_from(ServeOptions, await asyncio.to_thread(_kept_request, log.folder))
        await log.reopen()
        log.lasts = True
        log.record.state, log.record.message = "recovering", None
        await log.save()
        await self._free_name(options.public_name)
        self._start_serving(log, options, again=True)

    async def generate(self, request: Mapping[str, Any]) -> JobLog:
        """Start generating; what can be refused at once is raised here."""
        options = options_from(GenerateOptions, request)
        options.check()
        await asyncio.to_thread(model_folder, options.model)
        log = self._new("generate", options.model)
        self._start(log, GenerateJob(options, log, self._services).run)
        return log

    async def serve(self, request: Mapping[str, Any]) -> JobLog:
        """Start serving a model; what can be refused at once is raised here."""
        options = options_from(ServeOptions, request)
        options.check()
        found = await self._services.importer.with_folder(options)
        await asyncio.to_thread(serve_workload, found)
        log = self._new("serve", options.model)
        log.record.name = options.public_name
        try:
            if options.stays:
                log.lasts = True
                await asyncio.to_thread(_keep_request, log.folder, request)
            await self._free_name(options.public_name)  # and taken before anything else happens
        except BaseException:
            del self._logs[log.record.id]
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, log.folder, ignore_errors=True))
            raise
        self._start_serving(log, options)
        return log

    def served(self, name: str) -> ServeJob:
        """The model that clients call by that name."""
        found = self._served.get(name)
        if found is None:
            known = ", ".join(sorted(self._served)[:10])
            hint = f"there is {known}" if known else "start one with `confidant serve MODEL`"
            raise ModelNotFoundError(f"the model {name[:200]!r} is not served here", hint)
        return found

    def all_served(self) -> Sequence[ServeJob]:
        """Those that answer, in the order of their names."""
        return [self._served[name] for name in sorted(self._served) if self._served[name].ready]

    async def _free_name(self, name: str) -> None:
        """One that was just cancelled is waited for."""
        found = self._served.get(name)
        task = None if found is None else self._running.get(found.id)
        if task is not None and task.cancelling():
            await asyncio.wait({task})
        if name in self._served:
            raise UsageError(f"{name} is served already", "give it another name with --name")

    def _start_serving(self, log: JobLog, options: ServeOptions, *, again: bool = False) -> None:
        job = ServeJob(options, log, self._services, again=again)
        self._served[job.name] = job

        async def run() -> None:
            try:
                await job.run()
            finally:
                del self._served[job.name]

        self._start(log, run)

    def cancel(self, job: str) -> None:
        """Cancel a running job; one that failed loses its checkpoints."""
        log = self.get(job)
        task = self._running.get(log.record.id)
        if task is not None:  # once it has begun: one that never did would end without a word
            asyncio.get_running_loop().call_soon(task.cancel)
        elif log.record.state == "failed" and log.record.id not in self._resuming:
            log.record.state = "cancelled"
            self._tasks.start(self._keep(log), f"keep-{log.record.id}")
        elif log.record.state in FINAL_STATES:
            raise UsageError(f"the job {log.record.id} is {log.record.state}")

    async def close(self) -> None:
        """End what runs and wait until its stages are released; training goes on next time."""
        self._closing = True
        await self._tasks.close()

    def _new(self, kind: Kind, model: str) -> JobLog:
        record = JobRecord(new_job_id(), kind, model, self._name, time.time(), epoch=FIRST_EPOCH)
        log = JobLog(record, self._folder / record.id)
        self._logs[record.id] = log
        self._forget_oldest()
        return log

    def _start(self, log: JobLog, run: Callable[[], Awaitable[None]]) -> None:
        job = log.record.id
        self._running[job] = self._tasks.start(self._run(log, run), job)

    async def _run(self, log: JobLog, run: Callable[[], Awaitable[None]]) -> None:
        """Run a job to its end, whatever that is, and keep the outcome."""
        failure: ConfidantError | None = None
        try:
            await run()
            log.record.state = "done"
        except asyncio.CancelledError:
            if not (self._closing and log.lasts):
                failure = CancelledJobError("the job was cancelled")
                log.record.state = "cancelled"
            raise
        except BaseExceptionGroup as group:
            failure = _first_cause(group)
        except ConfidantError as caught:
            failure = caught
        except TimeoutError:
            failure = PeerLostError("a device did not answer in time", "see `confidant peers`")
        except OSError as caught:
            failure = StorageError(
                f"{caught.filename or 'a file'}: {caught.strerror or caught}",
                "free some disk space or change the permissions",
            )
        finally:
            await asyncio.shield(self._end(log, failure))

    async def _end(self, log: JobLog, failure: ConfidantError | None) -> None:
        if failure is not None:
            if log.record.state != "cancelled":
                log.record.state = "failed"
            if log.record.kind == "train" and log.record.state == "failed" and log.record.committed:
                resume = f"`confidant jobs resume {log.record.id}` goes on after step "
                failure.hint = "; ".join(
                    filter(None, (failure.hint, resume + str(log.record.committed)))
                )
            log.record.message = str(failure)
            log.emit(failure_event(failure))
            if log.record.kind == "serve" and log.record.state == "failed":
                _log.warning("job %s ended: %s", log.record.id, failure)
        elif log.record.state not in FINAL_STATES and not self._closing:
            log.record.state, internal = "failed", ConfidantError("an internal error ended the job")
            log.record.message = str(internal)
            log.emit(failure_event(internal))
        log.close()
        await self._keep(log)
        self._running.pop(log.record.id, None)

    async def _keep(self, log: JobLog) -> None:
        """The record of a job that has ended, and what else there is to keep."""
        try:
            await asyncio.to_thread(_remove_data, log.folder, log.record.state)
            await log.save()
        except (OSError, StorageError) as caught:
            _log.warning("job %s: its record was not saved (%s)", log.record.id, caught)

    def _forget_oldest(self) -> None:
        ended = [log for log in self._logs.values() if log.record.state in FINAL_STATES]
        ended.sort(key=lambda log: log.record.created)
        for log in ended[: max(0, len(self._logs) - MAX_REMEMBERED_JOBS)]:
            del self._logs[log.record.id]
            shutil.rmtree(log.folder, ignore_errors=True)


def _first_cause(group: BaseExceptionGroup[BaseException]) -> ConfidantError:
    """The first error of a group that says something; anything else is a bug and is raised."""
    known, rest = group.split(ConfidantError)
    while isinstance(known, BaseExceptionGroup):
        first = known.exceptions[0]
        if isinstance(first, ConfidantError):
            return first
        known = first if isinstance(first, BaseExceptionGroup) else None
    raise rest or group


def _read_logs(folder: Path) -> list[JobLog]:
    logs = []
    for path in sorted(folder.glob("*/job.json")):
        try:
            record = JobRecord(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as failure:
            _log.warning("the record %s cannot be read (%s); it is left alone", path, failure)
            continue
        logs.append(JobLog.ended(record, path.parent))
    return logs


def _remove_data(folder: Path, state: State) -> None:
    """Tokens of private text do not outlive their job; where it failed it may be resumed."""
    if state not in FINAL_STATES:
        return
    for name in ("train", "eval") if state == "failed" else ("train", "eval", CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)


def _keep_request(folder: Path, request: Mapping[str, Any]) -> None:
    """For another run of the daemon."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise storage_error(folder, failure) from None
    write_atomically(folder / REQUEST_NAME, json.dumps(dict(request)).encode())


def _kept_request(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / REQUEST_NAME).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise StorageError(
            f"what the job was asked for is not in {folder / REQUEST_NAME}", "start it again"
        )
    return found
