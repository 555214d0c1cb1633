"""What is known of a job: its record, kept on disk, and its events, kept for watchers."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from confidantd.ids import JobId
from confidantd.store.files import write_atomically

Kind = Literal["train", "generate", "serve"]
State = Literal["planning", "running", "recovering", "done", "failed", "cancelled"]
FINAL_STATES: tuple[State, ...] = ("done", "failed", "cancelled")
EVENTS_NAME, RECORD_NAME = "events.jsonl", "job.json"
MAX_EVENTS = 4_000  # about 1.5 MB; beyond that every second old step is forgotten
KEPT_EVENTS = 500  # the newest ones always stay


@dataclass(slots=True)
class JobRecord:
    """One line of `confidant jobs`."""

    id: JobId
    kind: Kind
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
    name: str | None = None  # that clients call a served model by
    committed: int = 0  # steps that are on the owner's disk

    def to_json(self) -> dict[str, Any]:
        """The keys of the contract, and those we add."""
        return asdict(self)


class JobLog:
    """A job's record and events; watchers get every event from the first to the last.

    Who watches from the start misses nothing; who comes late to a long job gets its
    older steps thinned out. Progress of one phase is one event that changes.
    """

    def __init__(self, record: JobRecord, folder: Path) -> None:
        self.record = record
        self.folder = folder
        self.lasts = False  # another run of the daemon goes on with it
        self._numbers: list[int] = []  # of the events that are kept, ascending
        self._events: list[dict[str, Any]] = []
        self._next = 0
        self._closed = False
        self._on_disk = False
        self._saved = False  # with its last event
        self._followers = 0
        self._changed = asyncio.Event()
        self._file: io.FileIO | None = None  # what follows the last `save`

    async def reopen(self) -> None:
        """Go on with an ended job: its events come back, and more follow."""
        if self._on_disk:
            self._events = await asyncio.to_thread(self._read)
            self._numbers = list(range(len(self._events)))
            self._next = len(self._events)
            steps = [event["step"] for event in self._events if event.get("event") == "step"]
            self.record.step = max([self.record.step, *steps[-1:]])
        self._closed = self._on_disk = self._saved = False

    @classmethod
    def ended(cls, record: JobRecord, folder: Path) -> JobLog:
        """The log of a job of an earlier run; its events stay on disk until they are asked for."""
        log = cls(record, folder)
        log._closed = True
        log._on_disk = True
        return log

    def emit(self, event: dict[str, Any]) -> None:
        """Add an event and wake the watchers."""
        last = self._events[-1] if self._events else {}
        if event["event"] == "progress" and _phase(last) == _phase(event):
            self._numbers.pop()
            self._events.pop()
        self._numbers.append(self._next)
        self._events.append(event)
        self._next += 1
        self._append(event)
        if len(self._events) > MAX_EVENTS:
            self._thin_out()
        self._wake()

    def _append(self, event: dict[str, Any]) -> None:
        """To the file, for another run of the daemon; `save` brings what a full disk loses."""
        if self._file is not None and event["event"] != "progress":
            with contextlib.suppress(OSError):
                self._file.write(json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        """No event will come after this."""
        self._closed = True
        self._wake()

    async def last(self, name: str) -> dict[str, Any] | None:
        """The last event of a kind so far."""
        events = await asyncio.to_thread(self._read) if self._on_disk else self._events
        return next((event for event in reversed(events) if event["event"] == name), None)

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Every event so far, then each new one; ends after the last."""
        if self._on_disk:
            for event in await asyncio.to_thread(self._read):
                yield event
            return
        self._followers += 1
        try:
            async for event in self._follow():
                yield event
        finally:
            self._followers -= 1
            self._release()

    async def _follow(self) -> AsyncIterator[dict[str, Any]]:
        seen = -1
        while True:
            changed = self._changed
            for number, event in self._after(seen):
                seen = number
                yield event
            if self._closed and seen == self._next - 1:
                return
            if changed is self._changed:
                await changed.wait()

    async def save(self) -> None:
        """Write record and events durably."""
        events = None
        if not self._on_disk:
            events = "".join(json.dumps(event) + "\n" for event in self._events)
        record = json.dumps(self.record.to_json(), indent=1)

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if events is not None:
                write_atomically(self.folder / EVENTS_NAME, events.encode())
            write_atomically(self.folder / RECORD_NAME, record.encode())

        written = self._next
        await asyncio.to_thread(write)
        await self._open_file(written)
        self._saved = self._closed
        self._release()

    async def _open_file(self, written: int) -> None:
        """Append from now on, beginning with what came while the others were written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._closed:
            with contextlib.suppress(OSError):
                path = self.folder / EVENTS_NAME
                self._file = await asyncio.to_thread(io.FileIO, path, "a")
            for number, event in self._after(written - 1):
                if number >= written:
                    self._append(event)

    def _release(self) -> None:
        """Let go of the events of an ended job that nobody follows: they are on disk."""
        if self._saved and not self._followers:
            self._on_disk = True
            self._numbers, self._events = [], []

    def _after(self, seen: int) -> list[tuple[int, dict[str, Any]]]:
        place = bisect.bisect_right(self._numbers, seen)
        return list(zip(self._numbers[place:], self._events[place:], strict=True))

    def _thin_out(self) -> None:
        """Forget every second step among the older events."""
        old = len(self._events) - KEPT_EVENTS
        kept = [
            i for i in range(len(self._events))
            if i >= old or i % 2 == 0 or self._events[i]["event"] not in ("step", "token")
        ]  # fmt: skip
        self._numbers = [self._numbers[i] for i in kept]
        self._events = [self._events[i] for i in kept]

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / EVENTS_NAME).read_text().splitlines()
        except (OSError, ValueError):
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last one, when the daemon was killed
                found.append(json.loads(line))
        return [event for event in found if isinstance(event, dict) and "event" in event]

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _phase(event: dict[str, Any]) -> object:
    return (event.get("event"), event.get("phase"))
