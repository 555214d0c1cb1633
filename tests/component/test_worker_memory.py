"""The watch that ends a worker before it uses more memory than it may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from confidantd.worker import memory
from confidantd.worker.memory import MemoryWatch, memory_bytes

SOON = 10.0  # seconds


@contextmanager
def watching(limit_bytes: int) -> Iterator[tuple[MemoryWatch, threading.Event, list[int]]]:
    seen: list[int] = []
    over = threading.Event()

    def too_much(used: int) -> None:
        seen.append(used)
        over.set()

    watch = MemoryWatch(limit_bytes, too_much)
    watch.start()
    try:
        yield watch, over, seen
    finally:
        watch.stop()


def test_memory_over_the_limit_is_told_once() -> None:
    with watching(1) as (_, over, seen):
        assert over.wait(SOON)
    assert len(seen) == 1
    assert seen[0] == pytest.approx(memory_bytes(), rel=0.5)


def test_a_lowered_limit_is_looked_at_in_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAST_WATCH_SECONDS", 10 * SOON)  # it looks at nothing by itself
    with watching(0) as (watch, over, seen):
        watch.limit_bytes = 1
        assert over.wait(SOON)
        assert watch.limit_bytes == 1
    assert len(seen) == 1


def test_stopping_does_not_wait_for_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAST_WATCH_SECONDS", 10 * SOON)
    with watching(0) as (watch, over, _):
        watch.stop()
        assert not over.is_set()
        assert not watch._thread.is_alive()
