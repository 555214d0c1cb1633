"""Two or three networks in one process, over real TLS on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from confidantd.errors import (
    DataError,
    IdentityConflictError,
    NotPairedError,
    PeerLostError,
    PeerRefusedError,
    PortTakenError,
    ProtocolError,
    StorageError,
)
from confidantd.ids import DeviceId, digest_of
from confidantd.net.dialer import CONTROL_PATH
from confidantd.net.tls import client_context
from confidantd.wire.codec import MAX_MESSAGE_BYTES
from confidantd.wire.messages import Hello, encode
from tests.component.net_support import Device, new_device, pair, running, until


async def _devices(tmp_path: Path, count: int) -> list[Device]:
    made = [await new_device(tmp_path / name) for name in ("one", "two", "three")[:count]]
    return sorted(made, key=lambda device: device.id)


async def _echo(_: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
    return {"back": params["text"]}


async def _fail(_: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
    raise DataError("the text is empty", "give some")


async def _break(_: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
    return {"value": 1 // params["zero"]}


def _one_task_at_most(device: Device) -> bool:
    return len(device.network._tasks) <= 1


async def _connect(a: Device, b: Device, expect: DeviceId | None = None) -> DeviceId:
    return await a.network.connect("127.0.0.1", b.network.port, expect)


async def test_requests_notifications_and_errors_both_ways(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    heard: list[int] = []
    for device in (a, b):
        device.network.on_request("echo", _echo)
        device.network.on_request("fail", _fail)
        device.network.on_request("break", _break)
        device.network.on_notify("topic", lambda _, params: heard.append(params["n"]))
    async with running(a, b):
        assert await _connect(a, b) == b.id
        await until(lambda: a.id in b.network.connected(), "the other side")
        for one, other in ((a, b), (b, a)):
            network = one.network
            answer = await network.request(other.id, "echo", {"text": "x"}, timeout_seconds=5)
            assert answer == {"back": "x"}
            with pytest.raises(DataError, match="the text is empty"):
                await network.request(other.id, "fail", {}, timeout_seconds=5)
            with pytest.raises(ProtocolError, match="nothing answers"):
                await network.request(other.id, "unknown", {}, timeout_seconds=5)
            with pytest.raises(Exception, match="failed inside"):
                await network.request(other.id, "break", {"zero": 0}, timeout_seconds=5)
        for number in range(100):
            assert await a.network.notify(b.id, "topic", {"n": number})
        await until(lambda: len(heard) == 100, "all notifications")
        assert heard == list(range(100))
        assert b.network.address(a.id) == ("127.0.0.1", a.network.port)
    assert not a.network.connected()
    assert not b.network.connected()
    assert not await a.network.notify(b.id, "topic", {})


async def test_a_request_that_is_not_answered_ends_in_time_and_a_lost_peer_at_once(
    tmp_path: Path,
) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    asked = asyncio.Event()

    async def hang(_: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        asked.set()
        await asyncio.Event().wait()
        return {}

    b.network.on_request("hang", hang)
    async with running(a):
        async with running(b):
            await _connect(a, b)
            with pytest.raises(PeerLostError, match=r"did not answer hang within 0\.1 s"):
                await a.network.request(b.id, "hang", {}, timeout_seconds=0.1)
            asked.clear()
            waiting = asyncio.create_task(a.network.request(b.id, "hang", {}, timeout_seconds=60))
            await asked.wait()
        with pytest.raises(PeerLostError, match="is gone"):
            await waiting
        with pytest.raises(PeerRefusedError, match="nothing listens"):
            await _connect(a, b)
        with pytest.raises(PeerLostError, match="not connected"):
            await a.network.request(b.id, "hang", {}, timeout_seconds=1)


@pytest.mark.parametrize("who_trusts", ["nobody", "dialer", "listener"])
async def test_a_stranger_ends_at_the_handshake(tmp_path: Path, who_trusts: str) -> None:
    a, b = await _devices(tmp_path, 2)
    if who_trusts == "dialer":
        await asyncio.to_thread(a.trust.add, b.identity.certificate_pem)
    if who_trusts == "listener":
        await asyncio.to_thread(b.trust.add, a.identity.certificate_pem)
    async with running(a, b):
        with pytest.raises(NotPairedError, match=r"not paired|does not know"):
            await _connect(a, b)
        assert not a.network.connected()
        assert not b.network.connected()


async def test_another_device_than_expected_is_refused(tmp_path: Path) -> None:
    a, b, c = await _devices(tmp_path, 3)
    await pair([a, b, c])
    async with running(a, b):
        with pytest.raises(NotPairedError, match="another device than the expected"):
            await _connect(a, b, expect=c.id)
        assert await _connect(a, b, expect=b.id) == b.id


async def test_trust_added_later_works_and_trust_removed_closes(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await asyncio.to_thread(a.trust.add, b.identity.certificate_pem)
    async with running(a, b):
        with pytest.raises((NotPairedError, PeerLostError)):
            await _connect(a, b)
        await asyncio.to_thread(b.trust.add, a.identity.certificate_pem)
        await _connect(a, b)
        await until(lambda: b.network.connected() == {a.id}, "the connection")
        await asyncio.to_thread(b.trust.remove, a.id)
        await until(lambda: not a.network.connected(), "the end of the connection")
        with pytest.raises((NotPairedError, PeerLostError)):
            await _connect(a, b)
        assert not b.network.connected()


async def test_of_two_connections_one_stays_and_membership_is_not_disturbed(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    events: list[str] = []
    for device in (a, b):
        device.network.on_request("echo", _echo)
        device.network.on_connected(lambda _: events.append("connected"))
        device.network.on_disconnected(lambda _: events.append("disconnected"))
    async with running(a, b):
        for _ in range(3):
            await asyncio.gather(_connect(a, b), _connect(b, a), _connect(a, b))
            for one, other in ((a, b), (b, a)):
                await one.network.request(other.id, "echo", {"text": 1}, timeout_seconds=5)
        for device in (a, b):
            await until(partial(_one_task_at_most, device), "the duplicates to close")
        assert events == ["connected", "connected"]
        for one, other in ((a, b), (b, a)):
            await one.network.request(other.id, "echo", {"text": 1}, timeout_seconds=5)


async def test_blob_ranges_are_served_to_members(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    data = bytes(range(256)) * 8_192  # 2 MiB
    path = tmp_path / "file"
    path.write_bytes(data)
    digest = b.blobs.add(path, 100, 1_500_000)
    async with running(a, b):
        with pytest.raises(PeerLostError, match="not connected"):
            await a.network.read_blob(b.id, digest, 0, 1)
        await _connect(a, b)
        await until(b.network.connected, "the connection")
        read = a.network.read_blob
        assert await read(b.id, digest, 0, 1_500_000) == data[100 : 100 + 1_500_000]
        assert await read(b.id, digest, 1_499_990, 10) == data[1_500_090:1_500_100]
        with pytest.raises(StorageError, match="does not have"):
            await read(b.id, digest_of(b"other"), 0, 1)
        with pytest.raises(StorageError):
            await read(b.id, digest, 1_500_000, 1)
        with pytest.raises(PeerLostError, match="instead of"):
            await read(b.id, digest, 1_499_990, 20)
        path.write_bytes(data[:500_000])
        with pytest.raises((StorageError, PeerLostError)):
            await read(b.id, digest, 0, 1_500_000)
        await asyncio.to_thread(b.trust.remove, a.id)
        with pytest.raises((NotPairedError, PeerLostError)):
            await read(b.id, digest, 0, 1)


async def test_messages_up_to_the_limit_pass_and_larger_ones_close_the_connection(
    tmp_path: Path,
) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    b.network.on_request("echo", _echo)
    async with running(a, b):
        await _connect(a, b)
        text = b"x" * (MAX_MESSAGE_BYTES - 200)
        answer = await a.network.request(b.id, "echo", {"text": text}, timeout_seconds=30)
        assert answer["back"] == text
        with pytest.raises(PeerLostError, match="is gone"):
            await a.network.request(
                b.id, "echo", {"text": b"x" * MAX_MESSAGE_BYTES}, timeout_seconds=30
            )
        await until(lambda: not b.network.connected(), "the end of the connection")


async def test_two_releases_that_cannot_talk_say_so_on_both_sides(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    hello = Hello(99, a.id, "a", "i", 1, 1, (), "9.0")
    context = await asyncio.to_thread(client_context, a.identity.home)
    async with running(b), aiohttp.ClientSession() as session:
        url = f"wss://127.0.0.1:{b.network.port}{CONTROL_PATH}"
        async with session.ws_connect(url, ssl=context) as raw:
            await raw.send_bytes(encode(hello))
            assert b"protocol" in await raw.receive_bytes(timeout=5)  # its own greeting
            refusal = await raw.receive_bytes(timeout=5)
        assert b"speaks protocol 99" in refusal
        assert not b.network.connected()


async def test_reaching_oneself_is_no_conflict_and_a_copied_home_is(tmp_path: Path) -> None:
    a = await new_device(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy = await new_device(tmp_path / "copy")
    told: dict[str, list[str]] = {"a": [], "copy": []}
    a.network.on_conflict(told["a"].append)
    copy.network.on_conflict(told["copy"].append)
    async with running(a, copy):
        assert await _connect(a, a) == a.id
        assert told == {"a": [], "copy": []}
        with pytest.raises(IdentityConflictError, match="has the identity of this one"):
            await _connect(a, copy)
        await until(lambda: all(told.values()), "both to say so")
        assert told["a"] == [f"127.0.0.1:{copy.network.port}"]
        assert not a.network.connected()


async def test_a_third_device_notices_twins(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    copy_home = tmp_path / "copy"
    shutil.copytree(a.identity.home, copy_home)
    copy = await new_device(copy_home)
    twins: list[tuple[DeviceId, str]] = []
    b.network.on_twins(lambda *twin: twins.append(twin))
    async with running(a, b, copy):
        await _connect(a, b)
        await _connect(copy, b)
        await until(lambda: not a.network.connected(), "the first to be replaced")
        assert not twins  # so far it could be a restart
        await _connect(a, b)
        await until(
            lambda: twins == [(a.id, f"127.0.0.1:{copy.network.port}")], "the twins to be noticed"
        )


async def test_old_tls_and_silent_connections_are_dropped(tmp_path: Path) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    old = await asyncio.to_thread(client_context, a.identity.home)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running(b):
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.open_connection("127.0.0.1", b.network.port, ssl=old)
        reader, writer = await asyncio.open_connection("127.0.0.1", b.network.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            answer = await reader.read()
        assert b"HTTP" not in answer
        writer.close()


async def test_ports_asked_for_remembered_and_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} on 127.0.0.1 is in use"):
            async with running(await new_device(tmp_path / "asked", port)):
                pass
        device = await new_device(tmp_path / "remembered", None)
        (tmp_path / "remembered" / "port").write_text(f"{port}\n")
        async with running(device):
            chosen = device.network.port
            assert chosen != port
    again = await new_device(tmp_path / "remembered", None)
    async with running(again):
        assert again.network.port == chosen


async def test_strangers_that_say_nothing_keep_no_member_out(tmp_path: Path) -> None:
    a, b = [await new_device(tmp_path / name) for name in "ab"]
    await pair([a, b])
    async with running(a, b):
        a.network.expect("127.0.0.1")  # it was met before; strangers come from elsewhere
        silent = [
            await asyncio.open_connection(
                "127.0.0.1", a.network.port, local_addr=(f"127.0.0.{2 + i % 30}", 0)
            )
            for i in range(200)
        ]
        async with asyncio.timeout(4.0):  # less than their handshakes may take
            await b.network.connect("127.0.0.1", a.network.port, a.id)
        for _, writer in silent:
            writer.close()


async def test_one_device_has_so_many_connections_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("confidantd.net.acceptor.MAX_OPEN", 3)
    a, b = [await new_device(tmp_path / name) for name in "ab"]
    await pair([a, b])
    async with running(a):
        context = await asyncio.to_thread(client_context, b.identity.home)
        opened = []
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", a.network.port, ssl=context)
            opened.append((reader, writer))
        ended = [asyncio.create_task(_ended(reader)) for reader, _ in opened]
        await until(lambda: sum(task.done() for task in ended) == 2, "two were cut off")
        for task in ended:
            task.cancel()
        for _, writer in opened:
            writer.transport.abort()
        await asyncio.gather(*ended, return_exceptions=True)


async def _ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        await reader.read()


async def test_a_range_is_asked_for_again_where_a_device_had_too_many_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await _devices(tmp_path, 2)
    await pair([a, b])
    file = tmp_path / "weights"
    await asyncio.to_thread(file.write_bytes, b"x" * 100)
    digest = await asyncio.to_thread(a.blobs.add, file, 0, 100)
    async with running(a, b):
        await _connect(b, a)
        acceptor = a.network._acceptor
        assert acceptor is not None
        answers = iter((False, True))
        monkeypatch.setattr(acceptor, "_may_try", lambda _host: next(answers, False))
        assert await b.network.read_blob(a.id, digest, 0, 100) == b"x" * 100
        b.network._contexts.forget()  # a new connection is needed
        with pytest.raises(PeerLostError):
            await b.network.read_blob(a.id, digest, 0, 100)
