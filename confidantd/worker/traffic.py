"""What messages between stages take from a device's work: the links of real stages, on loopback.

A device with a processor to spare passes activations on while it computes; on others each one
is time in which nothing is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from confidantd.errors import ConfidantError
from confidantd.ids import DeviceId, JobId
from confidantd.wire.frames import FrameKind, tensor_bytes
from confidantd.wire.worker import StageAddress
from confidantd.worker.links import Links

LOOPBACK = "127.0.0.1"
LEAST_RUNS, WINDOW_SECONDS = 4, 0.25
START_SECONDS = 30.0


def message_seconds(
    home: str, device: DeviceId, shape: tuple[int, ...], work: Callable[[], None]
) -> float:
    """Seconds that sending or receiving one float32 tensor of `shape` takes from `work`.

    `work` is run again and again, first alone and then beside the messages. 0 where no
    connection can be opened on this device.
    """
    work()
    alone, _ = _runs(work)
    traffic = _Traffic(home, device, shape)

    def accompanied() -> None:
        traffic.exchange()
        work()

    try:
        traffic.start()
        accompanied()
        before = traffic.messages
        together, runs = _runs(accompanied)
        passed = traffic.messages - before
    except (ConfidantError, OSError):
        return 0.0
    finally:
        traffic.stop()
    return max(0.0, (together - alone) * runs / passed) if passed else 0.0


def _runs(work: Callable[[], None]) -> tuple[float, int]:
    """Mean seconds of a run, and how many there were."""
    runs, began = 0, time.perf_counter()
    while True:
        work()
        runs += 1
        seconds = time.perf_counter() - began
        if runs >= LEAST_RUNS and seconds > WINDOW_SECONDS:
            return seconds / runs, runs


class _Traffic:
    """Two stages on a thread, which send each other a tensor when they are told to.

    One after the other without a break they would find all in the processor's cache, and
    take a third of what they take beside work.
    """

    def __init__(self, home: str, device: DeviceId, shape: tuple[int, ...]) -> None:
        self.messages = 0  # sent or received
        self._home, self._device, self._shape = home, device, shape
        self._payload = bytes(tensor_bytes("float32", shape))
        self._wanted: asyncio.Queue[bool] = asyncio.Queue()
        self._loop = asyncio.new_event_loop()
        self._flows = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="traffic")

    def start(self) -> None:
        """Until both are connected; raises why they are not."""
        self._thread.start()
        self._flows.wait(START_SECONDS)
        if self._failure is not None:
            raise self._failure

    def exchange(self) -> None:
        """Let each stage send one tensor, beside what the caller does next."""
        self._want(True)

    def stop(self) -> None:
        """After what is under way."""
        self._want(False)
        if self._thread.ident is not None:
            self._thread.join()

    def _want(self, more: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has failed
            self._loop.call_soon_threadsafe(self._wanted.put_nowait, more)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._exchange())
        except (ConfidantError, OSError) as failure:
            self._failure = failure
        finally:
            self._flows.set()

    async def _exchange(self) -> None:
        first, second = (self._links(stage) for stage in range(2))
        try:
            ports = [await links.listen((LOOPBACK,)) for links in (first, second)]
            ends = {i: StageAddress(i, self._device, LOOPBACK, ports[i]) for i in range(2)}
            await asyncio.gather(first.connect(ends, {1}), second.connect(ends, {0}))
            self._flows.set()
            step = 0
            while await self._wanted.get():
                await self._pass(first, second, 1, step)
                await self._pass(second, first, 0, step)
                step += 1
        finally:
            await first.close()
            await second.close()

    def _links(self, stage: int) -> Links:
        return Links(self._home, JobId("traffic"), 0, stage, 2, len(self._payload))

    async def _pass(self, source: Links, target: Links, stage: int, step: int) -> None:
        kind = FrameKind.ACTIVATION
        await source.send(stage, kind, step, 0, self._payload, shape=self._shape)
        frame, _ = await target.inbox.take(kind, step, 0)
        await target.used(frame)
        self.messages += 2
