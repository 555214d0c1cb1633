"""Pairing by a code, and a roster that every member shares: real TLS on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from confidantd.errors import (
    ConfidantError,
    DeviceError,
    NotPairedError,
    PeerLostError,
    UsageError,
    WrongCodeError,
)
from confidantd.identity.certificate import load_or_create
from confidantd.net.tls import pairing_client_context, pairing_server_context
from confidantd.swarm import inviting, pairing_service
from confidantd.swarm.pairing import MAX_WRONG, Exchange
from confidantd.swarm.pairing_stream import PairingStream
from confidantd.swarm.roster import ROSTER_TOPIC
from confidantd.wire.codec import to_map
from confidantd.wire.pairing import Card, Knock, Share
from confidantd.wire.roster import Roster, Statement
from tests.component.net_support import pair, until
from tests.component.swarm_support import SwarmDevice, new_swarm_device, stopped_at_end

Devices = list[SwarmDevice]


@contextlib.asynccontextmanager
async def strangers(tmp_path: Path) -> AsyncIterator[Devices]:
    """Four devices on one loopback that know nobody; the first three run."""
    made = [await new_swarm_device(tmp_path / name) for name in ("anna", "ben", "cleo", "dora")]
    async with stopped_at_end(made):
        for device in made[:3]:
            await device.start()
        yield made


async def invited(device: SwarmDevice) -> tuple[str, str]:
    """A code of this device and where to join."""
    invitation = await device.swarm.pairing.invite()
    return str(invitation.code), f"127.0.0.1:{device.swarm.pairing.inviting.port}"


async def meet(one: SwarmDevice, *others: SwarmDevice) -> None:
    """Connect paired devices that do not know each other's address yet."""
    for other in others:
        await one.network.connect("127.0.0.1", other.network.port, other.id)


def wrong(code: str) -> str:
    """Another code of the same invitation."""
    last = (int(code[-1]) + 1) % 10
    return f"{code[:-1]}{last}"


def trusted(device: SwarmDevice) -> set[str]:
    """Ids of whom it trusts."""
    return set(device.trust.members())


async def test_the_code_pairs_two_devices_and_connects_them(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, *_ = devices
        code, at = await invited(anna)
        joined = await ben.swarm.pairing.join(code, at)
        assert joined.device == anna.id
        assert joined.name == "anna"
        last = anna.swarm.pairing.inviting.last
        assert last is not None
        assert (last.device, last.name) == (ben.id, "ben")
        await until(
            lambda: anna.states().get(ben.id) == ben.states().get(anna.id) == "alive",
            "both see each other",
        )


async def test_a_code_is_used_once(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, cleo, _ = devices
        code, at = await invited(anna)
        await ben.swarm.pairing.join(code, at)
        with pytest.raises(ConfidantError):
            await cleo.swarm.pairing.join(code, at)
        assert cleo.id not in trusted(anna)
        assert trusted(cleo) == set()


async def test_five_wrong_codes_end_an_invitation(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, *_ = devices
        code, at = await invited(anna)
        for _ in range(MAX_WRONG):
            with pytest.raises(WrongCodeError):
                await ben.swarm.pairing.join(wrong(code), at)
        with pytest.raises(ConfidantError):
            await ben.swarm.pairing.join(code, at)
        assert anna.swarm.pairing.inviting.invitation.outcome == "refused"  # type: ignore[union-attr]
        assert trusted(anna) == trusted(ben) == set()


async def test_a_code_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, *_ = devices
        monkeypatch.setattr(inviting, "INVITATION_SECONDS", 0.2)
        code, at = await invited(anna)
        await until(lambda: not anna.swarm.pairing.inviting.announced, "the invitation is closed")
        with pytest.raises(PeerLostError):
            await ben.swarm.pairing.join(code, at)


async def test_an_invitation_that_nobody_announces_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairing_service, "FIND_SECONDS", 0.2)
    async with strangers(tmp_path) as devices:
        with pytest.raises(PeerLostError, match="no device with an open invitation 000"):
            await devices[1].swarm.pairing.join("000-000-000", "")


async def test_who_stands_in_the_middle_learns_nothing_and_gets_nowhere(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, *_ = devices
        await asyncio.to_thread(load_or_create, tmp_path / "mallory")
        code, at = await invited(anna)
        seen = bytearray()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            port = int(at.rpartition(":")[2])
            ours = pairing_client_context()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port, ssl=ours)

            async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while data := await source.read(65_536):
                    seen.extend(data)
                    target.write(data)
                target.close()

            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

        context = await asyncio.to_thread(pairing_server_context, tmp_path / "mallory")
        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        middle = server.sockets[0].getsockname()[1]
        with pytest.raises(WrongCodeError):
            await ben.swarm.pairing.join(code, f"127.0.0.1:{middle}")
        server.close()
        await server.wait_closed()
        assert trusted(anna) == trusted(ben) == set()
        secret = code.replace("-", "")[3:]
        assert secret.encode() not in seen
        assert b"BEGIN CERTIFICATE" in seen  # it did read what passed: a certificate is no secret
        assert b"PRIVATE" not in seen


async def test_a_rogue_that_takes_the_proof_and_hangs_up_gets_one_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = await asyncio.to_thread(load_or_create, tmp_path / "mallory")
    proofs = []

    async def guess(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = PairingStream(reader, writer)
        knock = await stream.receive(Knock)
        exchange = Exchange("inviter", "000000", identity.device_id)
        exchange.meet(knock.share)
        await stream.send(Share(exchange.share))
        proofs.append(await stream.receive(Card))
        await stream.close()

    context = await asyncio.to_thread(pairing_server_context, tmp_path / "mallory")
    server = await asyncio.start_server(guess, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with strangers(tmp_path) as devices:
        pairing = devices[0].swarm.pairing
        monkeypatch.setattr(pairing, "_find", lambda _number: [("127.0.0.1", port)] * 8)
        with pytest.raises(NotPairedError, match="had this one's proof"):
            await pairing.join("123-456-789", "")
        assert trusted(devices[0]) == set()
    server.close()
    await server.wait_closed()
    assert len(proofs) == 1


async def told(device: SwarmDevice) -> tuple[Statement, ...]:
    """What a device says, signed."""
    await asyncio.to_thread(device.trust.sign)
    return device.trust.statements()


async def test_who_forges_what_another_member_says_is_cut_off(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, cleo, dora = devices
        await pair([anna, ben, cleo])
        await meet(cleo, ben)
        await asyncio.to_thread(cleo.trust.add, dora.identity.certificate_pem)
        real = next(s for s in await told(cleo) if s.device == dora.id)
        forged, cut_off = replace(real, author=anna.id), []
        ben.network.on_disconnected(cut_off.append)
        cleo.network.send(ben.id, ROSTER_TOPIC, to_map(Roster((forged,))))
        await until(lambda: cut_off == [cleo.id], "cleo is cut off")
        assert anna.id not in {s.author for s in ben.trust.statements() if s.device == dora.id}


async def test_a_removed_device_lets_nobody_in_where_it_is_still_believed(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, cleo, dora = devices  # dora is cleo's second identity
        await pair([anna, ben, cleo])
        await anna.swarm.pairing.remove(cleo.id)
        await asyncio.to_thread(cleo.trust.add, dora.identity.certificate_pem)
        await meet(cleo, ben)  # ben has not heard of it
        await until(lambda: dora.id in trusted(ben), "ben believes cleo")
        await meet(anna, ben)
        await until(lambda: trusted(ben) == {anna.id}, "both are out when ben hears of it")
        assert trusted(anna) == {ben.id}


async def test_two_swarms_become_one_only_where_that_is_wanted(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, _, cleo, dora = devices
        await pair([cleo, dora])
        code, at = await invited(anna)
        with pytest.raises(DeviceError, match="paired with 1 other already"):
            await cleo.swarm.pairing.join(code, at)
        assert trusted(anna) == set()
        await cleo.swarm.pairing.join(code, at, merge=True)
        await until(lambda: trusted(anna) == {cleo.id, dora.id}, "anna knows dora too")


async def test_a_device_does_not_join_itself(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        code, at = await invited(devices[0])
        with pytest.raises(UsageError, match="shows that code itself"):
            await devices[0].swarm.pairing.join(code, at)


async def test_an_old_tls_is_refused(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        code, at = await invited(devices[0])
        assert code
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", int(at.rpartition(":")[2]), ssl=old)


async def test_everybody_learns_of_a_new_member_also_who_was_off(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, cleo, dora = devices
        await pair([anna, ben, dora])
        await meet(anna, ben)
        await until(lambda: ben.id in anna.network.connected(), "anna and ben are connected")
        code, at = await invited(anna)
        await cleo.swarm.pairing.join(code, at)
        everyone = {device.id for device in devices}
        await until(lambda: trusted(ben) == everyone - {ben.id}, "ben knows all")
        await until(lambda: trusted(cleo) == everyone - {cleo.id}, "cleo knows all")
        assert cleo.id not in trusted(dora)
        await dora.start()
        await meet(dora, anna)
        await until(lambda: trusted(dora) == everyone - {dora.id}, "dora knows all")
        await until(lambda: dora.states().get(cleo.id) == "alive", "dora sees cleo")


async def test_a_removed_device_is_out_everywhere_and_stays_out(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, cleo, dora = devices
        await pair(devices)
        await meet(anna, ben, cleo)
        await meet(ben, cleo)
        await until(lambda: {ben.id, cleo.id} <= anna.network.connected(), "anna has both")
        await until(lambda: cleo.id in ben.network.connected(), "ben has cleo")
        await anna.swarm.pairing.remove(cleo.id)
        await until(lambda: cleo.id not in trusted(ben), "ben removed cleo")
        await until(
            lambda: cleo.id not in anna.network.connected() | ben.network.connected(),
            "its connections ended",
        )
        await until(lambda: trusted(cleo) == set(), "cleo was told")  # it was told
        assert cleo.id in trusted(dora)
        await dora.start()  # its old list brings nobody back
        await meet(dora, anna)
        await until(lambda: cleo.id not in trusted(dora), "dora removed cleo")
        assert cleo.id not in trusted(anna) | trusted(ben)
        code, at = await invited(ben)
        await cleo.swarm.pairing.join(code, at)  # a new invitation does
        await until(
            lambda: all(cleo.id in trusted(d) for d in (anna, ben, dora)), "all know cleo again"
        )
        await until(lambda: trusted(cleo) == {anna.id, ben.id, dora.id}, "cleo knows all again")


async def test_a_device_that_leaves_is_forgotten_and_forgets(tmp_path: Path) -> None:
    async with strangers(tmp_path) as devices:
        anna, ben, cleo, _ = devices
        await pair([anna, ben, cleo])
        await meet(cleo, anna, ben)
        await meet(anna, ben)
        await until(lambda: {anna.id, ben.id} <= cleo.network.connected(), "cleo has both")
        assert await cleo.swarm.pairing.leave() == 2
        assert trusted(cleo) == set()
        await until(lambda: trusted(anna) == {ben.id}, "anna forgot cleo")
        await until(lambda: trusted(ben) == {anna.id}, "ben forgot cleo")
        with pytest.raises(NotPairedError):
            await cleo.swarm.pairing.leave()
