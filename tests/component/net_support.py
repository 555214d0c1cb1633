"""Identities, networks and waiting for the component tests: real sockets and TLS on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from confidantd.identity.certificate import (
    CERTIFICATE_NAME,
    IDENTITY_FOLDER,
    KEY_NAME,
    Identity,
    load_or_create,
)
from confidantd.identity.create import create_identity
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, Digest, digest_of
from confidantd.net.network import Network

LOOPBACK = ("127.0.0.1",)
WAIT_SECONDS = 15.0


class MemoryBlobs:
    """A `BlobSource` whose blobs are ranges of files."""

    def __init__(self) -> None:
        self._found: dict[Digest, tuple[Path, int, int]] = {}

    def add(self, path: Path, offset: int, length: int) -> Digest:
        digest = digest_of(path.read_bytes()[offset : offset + length])
        self._found[digest] = (path, offset, length)
        return digest

    def locate(self, digest: Digest) -> tuple[Path, int, int] | None:
        return self._found.get(digest)


class Device:
    """One home with its identity, trust and network."""

    def __init__(self, home: Path, port: int | None = 0) -> None:
        folder = home / IDENTITY_FOLDER
        if not folder.exists():
            create_identity(folder, KEY_NAME, CERTIFICATE_NAME)
        self.identity: Identity = load_or_create(home)
        self.trust = TrustStore(home)
        self.blobs = MemoryBlobs()
        self.network = Network(
            self.identity, self.trust, LOOPBACK, port, self.blobs, name=home.name
        )

    @property
    def id(self) -> DeviceId:
        return self.identity.device_id


async def new_device(home: Path, port: int | None = 0) -> Device:
    """A device, made off the event loop since that reads and writes files."""
    return await asyncio.to_thread(Device, home, port)


async def pair(devices: Sequence[Device]) -> None:
    """Make every device trust every other."""
    for one in devices:
        for other in devices:
            if one.id != other.id:
                await asyncio.to_thread(one.trust.add, other.identity.certificate_pem)


@contextlib.asynccontextmanager
async def running(*devices: Device) -> AsyncIterator[None]:
    """The networks of the devices, serving."""
    tasks = []
    try:
        for device in devices:
            tasks.append(asyncio.create_task(device.network.run()))
            started = asyncio.create_task(device.network.started.wait())
            await asyncio.wait({tasks[-1], started}, return_when=asyncio.FIRST_COMPLETED)
            started.cancel()
            if tasks[-1].done():
                tasks.pop().result()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition that changes by events on the loop, with a time limit."""
    limit = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < limit, f"waited {WAIT_SECONDS:g} s for {what}"
        await asyncio.sleep(0.02)
