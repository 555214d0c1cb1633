"""Measuring the link between two networks in one process, over real TLS on 127.0.0.1."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from confidantd.errors import PeerLostError
from confidantd.ids import DeviceId
from confidantd.net.link_probe import LINK_PATH, MAX_LINK_BYTES
from confidantd.net.tls import client_context
from tests.component.net_support import Device, new_device, pair, running, until


async def _two(tmp_path: Path) -> tuple[Device, Device]:
    a, b = [await new_device(tmp_path / name) for name in ("one", "two")]
    await pair([a, b])
    return a, b


async def _meet(a: Device, b: Device) -> None:
    await a.network.connect("127.0.0.1", b.network.port, b.id)
    await until(lambda: a.id in b.network.connected(), "the other side")


async def test_both_ends_measure_and_their_control_connection_goes_on(tmp_path: Path) -> None:
    a, b = await _two(tmp_path)
    with pytest.raises(PeerLostError, match="is not connected"):
        await a.network.measure_link(b.id)
    async with running(a, b):
        await _meet(a, b)
        for one, other in ((a, b), (b, a)):
            for _ in range(2):  # a reader that stopped early leaves nothing behind
                assert await one.network.measure_link(other.id) > 10  # loopback, in Mbit/s
        assert b.id in a.network.connected()


async def test_one_measurement_at_a_time_at_either_end(tmp_path: Path) -> None:
    a, b = await _two(tmp_path)
    async with running(a, b):
        await _meet(a, b)
        context = await asyncio.to_thread(client_context, a.identity.home)
        url = f"https://127.0.0.1:{b.network.port}{LINK_PATH}"
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as reading:
            assert reading.content_length == MAX_LINK_BYTES
            with pytest.raises(PeerLostError, match="sends nothing to measure"):
                await a.network.measure_link(b.id)
            with pytest.raises(PeerLostError, match="transfers something else"):
                await b.network.measure_link(a.id)
        await until(lambda: not b.network._probe._running, "its end to be noticed")
        assert await a.network.measure_link(b.id) > 10


async def test_only_peers_may_measure(tmp_path: Path) -> None:
    a, b = await _two(tmp_path)
    async with running(a, b):
        await _meet(a, b)
        own = await asyncio.to_thread(client_context, b.identity.home)
        url = f"https://127.0.0.1:{b.network.port}{LINK_PATH}"
        async with aiohttp.ClientSession() as session, session.get(url, ssl=own) as response:
            assert response.status == 403  # it asks itself, with its own certificate


async def test_large_transfers_tell_the_bandwidth_and_shared_ones_do_not(tmp_path: Path) -> None:
    a, b, c = [await new_device(tmp_path / name) for name in ("one", "two", "three")]
    await pair([a, b, c])
    path = tmp_path / "blob"
    path.write_bytes(bytes(4 * 1024 * 1024))
    digest = b.blobs.add(path, 0, 4 * 1024 * 1024)
    told: list[tuple[DeviceId, float]] = []
    a.network.on_transfer(lambda *found: told.append(found))
    async with running(a, b, c):
        await _meet(a, b)
        await _meet(c, b)
        await a.network.read_blob(b.id, digest, 0, 100_000)
        assert not told
        await a.network.read_blob(b.id, digest, 0, 4 * 1024 * 1024)
        ((device, mbps),) = told
        assert device == b.id
        assert mbps > 10
        context = await asyncio.to_thread(client_context, c.identity.home)
        url = f"https://127.0.0.1:{b.network.port}/v1/blobs/{digest}"
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context):
            with pytest.raises(PeerLostError, match="sends nothing to measure"):
                await a.network.measure_link(b.id)  # while it serves another
            await a.network.read_blob(b.id, digest, 0, 4 * 1024 * 1024)
        assert len(told) == 1
