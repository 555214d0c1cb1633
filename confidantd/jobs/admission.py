"""Who is served next: a bounded queue in which clients take turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque

from confidantd.errors import BusyError


class Admission:
    """So many requests at once, and so many that wait. A place is given to the clients in turn,
    whatever each has in the queue.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        self._free, self._most_waiting = most, most_waiting
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self.waiting = 0

    async def enter(self, client: str, *, always: bool = False) -> Place:
        """A place, once there is one; `BusyError` if too many wait for it, unless it is `always`
        waited for.
        """
        if self._free and not self.waiting:
            self._free -= 1
            return Place(self)
        if self.waiting >= self._most_waiting and not always:
            raise BusyError(
                f"{self.waiting} requests wait already", "try again when some are answered"
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()  # it was given a place in that very moment
            else:
                self._forget(client, turn)
            raise
        return Place(self)

    def leave(self) -> None:
        """A place is free."""
        while self._queues:
            client, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            self.waiting -= 1
            if queue:
                self._queues[client] = queue  # behind the others
            if not turn.done():  # cancelled just now
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(client, deque())
        with contextlib.suppress(ValueError):
            queue.remove(turn)
            self.waiting -= 1
        if not queue:
            self._queues.pop(client, None)


class Place:
    """One request's; given back once."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def leave(self) -> None:
        """Let the next one have it."""
        if self._admission is not None:
            admission, self._admission = self._admission, None
            admission.leave()
