"""States of stages on this device's disk, each for as long as a stage here needs it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager

from confidantd.ids import Digest
from confidantd.store.blobs import BlobStore
from confidantd.tasks import TaskSet


class PassingStates:
    """Equal states are one blob, also of an epoch that is over and of the next one: what one
    stage drops another one may have written, or begin with.

    `written`: those that stages here have written, for others to fetch.
    """

    def __init__(self, store: BlobStore, written: Callable[[], AbstractSet[Digest]]) -> None:
        self._store = store
        self._written = written
        self._readers: Counter[Digest] = Counter()
        self._dropping = asyncio.Lock()
        self._tasks = TaskSet("states")

    @asynccontextmanager
    async def reading(self, digests: AbstractSet[Digest]) -> AsyncIterator[None]:
        """A stage begins with them: meanwhile they stay. Then they are in its memory; on the disk
        they would outlive the job.
        """
        async with self._dropping:  # what is being dropped is gone before anybody looks for it
            self._readers.update(digests)
        try:
            yield
        finally:
            self._readers.subtract(digests)
            await self.drop(digests)

    async def drop(self, digests: AbstractSet[Digest]) -> None:
        """Remove those that nobody needs here, also where who asked for it goes meanwhile."""
        await asyncio.shield(self._tasks.start(self._drop(digests), "drop"))

    async def close(self) -> None:
        """Wait until all is dropped."""
        await self._tasks.finish()

    async def _drop(self, digests: AbstractSet[Digest]) -> None:
        async with self._dropping:
            needed = self._written() | {digest for digest, n in self._readers.items() if n > 0}
            self._readers += Counter()  # forgets those without readers
            for digest in digests - needed:
                await asyncio.to_thread(self._store.remove, digest)
