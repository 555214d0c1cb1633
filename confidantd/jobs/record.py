"""What is known of a job: its record, kept on disk, and its events, kept for watchers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from confidantd.ids import JobId
from confidantd.store.files import write_atomically

State = Literal["planning", "running", "recovering", "done", "failed", "cancelled"]
FINAL_STATES: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(slots=True)
class JobRecord:
    """One line of `confidant jobs`."""

    id: JobId
    kind: Literal["train", "generate"]
    model: str
    owner: str
    created: float
    state: State = "planning"
    step: int = 0
    steps: int = 0
    epoch: int = 0
    devices: list[str] = field(default_factory=list)
    output: str | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of the contract, and those we add."""
        return asdict(self)


class JobLog:
    """A job's record and events; watchers get every event from the first to the last."""

    def __init__(self, record: JobRecord, folder: Path) -> None:
        self.record = record
        self.folder = folder
        self._events: list[dict[str, Any]] = []
        self._closed = False
        self._changed = asyncio.Event()

    def emit(self, event: dict[str, Any]) -> None:
        """Add an event and wake the watchers."""
        last = self._events[-1] if self._events else {}
        same_phase = event.get("event") == "progress" and (
            last.get("event"),
            last.get("phase"),
        ) == ("progress", event.get("phase"))
        if same_phase:
            self._events[-1] = event
        else:
            self._events.append(event)
        self._wake()

    def close(self) -> None:
        """No event will come after this."""
        self._closed = True
        self._wake()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Every event so far, then each new one; ends after the last."""
        place = 0
        shown: dict[str, Any] | None = None
        while True:
            changed = self._changed
            if place and self._events[place - 1] is not shown:
                shown = self._events[place - 1]  # its phase has gone on
                yield shown
            while place < len(self._events):
                shown = self._events[place]
                place += 1
                yield shown
            if self._closed:
                return
            if changed is self._changed:
                await changed.wait()

    async def save(self) -> None:
        """Write record and events durably."""
        lines = "".join(json.dumps(event) + "\n" for event in self._events)
        record = json.dumps(self.record.to_json(), indent=1)

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "events.jsonl", lines.encode())
            write_atomically(self.folder / "job.json", record.encode())

        await asyncio.to_thread(write)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
