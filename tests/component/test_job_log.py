"""A job's log: watchers get every event, and the log stays bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from confidantd.ids import JobId
from confidantd.jobs.record import MAX_EVENTS, JobLog, JobRecord
from confidantd.tasks import TaskSet


def make_log(folder: Path) -> JobLog:
    """An empty log."""
    return JobLog(JobRecord(JobId("abc"), "train", "m", "anna", 1.0), folder)


async def collect(log: JobLog) -> list[dict[str, Any]]:
    """All events until the log is closed."""
    return [event async for event in log.follow()]


async def test_a_watcher_from_the_start_and_a_late_one_get_the_same(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    tasks = TaskSet("test")
    early = tasks.start(collect(log), "early")
    for step in range(3):
        log.emit({"event": "step", "step": step})
        await asyncio.sleep(0)
    log.emit({"event": "done"})
    log.close()
    assert await early == await collect(log)
    assert [event["event"] for event in await collect(log)] == ["step"] * 3 + ["done"]


async def test_progress_of_a_phase_is_one_event_that_changes(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    for done in range(5):
        log.emit({"event": "progress", "phase": "load", "done": done})
    log.emit({"event": "progress", "phase": "save", "done": 0})
    log.close()
    assert [(e["phase"], e["done"]) for e in await collect(log)] == [("load", 4), ("save", 0)]


async def test_a_long_job_does_not_fill_the_memory(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.emit({"event": "plan"})
    for step in range(5 * MAX_EVENTS):
        log.emit({"event": "step", "step": step})
    log.emit({"event": "done"})
    log.close()
    events = await collect(log)
    assert len(events) <= MAX_EVENTS
    assert events[0]["event"] == "plan"
    assert events[-1]["event"] == "done"
    assert [e["step"] for e in events[-101:-1]] == list(range(5 * MAX_EVENTS - 100, 5 * MAX_EVENTS))


async def test_an_ended_job_is_read_from_disk(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.emit({"event": "step", "step": 1})
    log.emit({"event": "done"})
    log.record.state = "done"
    log.close()
    before = await collect(log)
    await log.save()
    assert await collect(log) == before
    again = JobLog.ended(log.record, tmp_path)
    assert await collect(again) == before
