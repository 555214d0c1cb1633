"""Swarms of three in one process, over real TLS on 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from confidantd.errors import ConfigError, NoCoordinatorError
from confidantd.ids import short_id
from tests.component.net_support import pair, until
from tests.component.swarm_support import (
    SwarmDevice,
    agreed,
    new_swarm_device,
    resources,
    stopped_at_end,
)


def _is_unpaired(device: SwarmDevice, stranger: SwarmDevice) -> bool:
    return device.states().get(stranger.id) == "unpaired"


def _knows_every_link(device: SwarmDevice) -> bool:
    """Its own, and by gossip that between the two others."""
    views = device.swarm.peers()
    pairs = {
        frozenset((view.id, other))
        for view in views
        for other, link in view.links.items()
        if link.mbps is not None
    }
    own = [view.bandwidth_mbps for view in views if not view.is_self]
    return len(pairs) == 3 and None not in own


async def _three(tmp_path: Path) -> list[SwarmDevice]:
    """Started one after another; each but the first is given the address of the first alone."""
    first = await new_swarm_device(tmp_path / "one")
    devices = [first]
    await first.start()
    for name in ("two", "three"):
        devices.append(await new_swarm_device(tmp_path / name, [first.address]))
        await pair(devices)
        await devices[-1].start()
    return devices


async def test_three_meet_by_one_typed_address_and_elect_again_when_one_ends(
    tmp_path: Path,
) -> None:
    devices = await _three(tmp_path)
    async with stopped_at_end(devices):
        await until(lambda: agreed(devices), "one coordinator")
        lost = next(d for d in devices if d.id == d.followed())
        term = lost.swarm.coordinator()
        assert term is not None
        await lost.stop()
        left = [device for device in devices if device is not lost]
        await until(lambda: agreed(left), "a new coordinator")
        for device in left:
            assert device.states()[lost.id] == "gone"
            now = device.swarm.coordinator()
            assert now is not None
            assert now.term > term.term
            remembered = json.loads((device.identity.home / "term.json").read_text())
            assert remembered["term"] >= now.term


async def test_resources_names_addresses_and_links_are_known_to_all(tmp_path: Path) -> None:
    devices = await _three(tmp_path)
    async with stopped_at_end(devices):
        for number, device in enumerate(devices):
            device.swarm.set_resources(resources(number + 1, *["compiler"] * (number == 1)))
        offered = {
            device.id: resources(n + 1, *["compiler"] * (n == 1))
            for n, device in enumerate(devices)
        }
        await until(
            lambda: all({p.id: p.resources for p in d.swarm.peers()} == offered for d in devices),
            "the resources",
        )
        await until(
            lambda: all(p.round_trip_ms is not None for d in devices for p in d.swarm.peers()),
            "round trips",
        )
        await until(lambda: all(map(_knows_every_link, devices)), "links between all")
        for device in devices:
            views = {peer.id: peer for peer in device.swarm.peers()}
            assert {d.id: d.address for d in devices} == {i: v.address for i, v in views.items()}
            assert {v.name for v in views.values()} == {"one", "two", "three"}
            assert device.swarm.tag() == devices[0].swarm.tag()
            assert views[device.id].is_self


async def test_a_restarted_device_finds_the_others_by_remembered_addresses(tmp_path: Path) -> None:
    devices = await _three(tmp_path)
    async with stopped_at_end(devices):
        await until(lambda: agreed(devices), "one coordinator")
        again = devices.pop()
        await again.stop()
        await until(lambda: agreed(devices), "the others to go on")
        incumbent = devices[0].followed()
        assert (again.identity.home / "addresses.json").exists()
        devices.append(await new_swarm_device(again.identity.home))
        await devices[-1].start()
        await until(lambda: agreed(devices), "all three again")
        assert devices[0].followed() == incumbent


async def test_a_removed_member_is_no_peer_any_more(tmp_path: Path) -> None:
    devices = await _three(tmp_path)
    async with stopped_at_end(devices):
        await until(lambda: agreed(devices), "one coordinator")
        one, two, _ = devices
        await asyncio.to_thread(one.trust.remove, two.id)
        assert two.id not in one.states()
        await until(lambda: two.id not in one.network.connected(), "the end")
        await until(lambda: two.states() == {}, "the other side to hear of it")


async def test_two_that_meet_late_keep_exactly_one_coordinator(tmp_path: Path) -> None:
    one = await new_swarm_device(tmp_path / "one")
    await one.start()
    two = await new_swarm_device(tmp_path / "two", [one.address])
    await two.start()
    async with stopped_at_end([one, two]):
        await until(lambda: one.followed() == one.id, "each to coordinate itself")
        await until(lambda: two.followed() == two.id, "each to coordinate itself")
        await pair([one, two])
        await until(lambda: agreed([one, two]), "one coordinator")


async def test_waiting_for_a_coordinator_has_a_limit(tmp_path: Path) -> None:
    device = await new_swarm_device(tmp_path / "one")
    with pytest.raises(NoCoordinatorError):
        await device.swarm.wait_for_coordinator(0.01)
    await device.start()
    async with stopped_at_end([device]):
        view = await device.swarm.wait_for_coordinator(10)
        assert (view.id, view.name) == (device.id, "one")


async def test_a_typed_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        await new_swarm_device(tmp_path / "one", ["nonsense"])


async def test_a_copied_home_is_told_by_both_and_goes_when_it_is_repaired(tmp_path: Path) -> None:
    one = await new_swarm_device(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    await one.start()
    copy = await new_swarm_device(tmp_path / "copy", [one.address])
    await copy.start()
    async with stopped_at_end([one, copy]):
        await until(lambda: one.swarm.conflict() and copy.swarm.conflict(), "both to say so")
        sentence = one.swarm.conflict()
        assert sentence is not None
        assert copy.address in sentence
        assert "delete the folder identity" in sentence
        await copy.stop()
        await until(lambda: one.swarm.conflict() is None, "the conflict to go")


async def test_a_member_tells_both_copies_about_each_other(tmp_path: Path) -> None:
    member = await new_swarm_device(tmp_path / "member")
    await member.start()
    one = await new_swarm_device(tmp_path / "one", [member.address])
    await pair([member, one])
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    copy = await new_swarm_device(tmp_path / "copy", [member.address])
    await one.start()
    await copy.start()
    async with stopped_at_end([member, one, copy]):
        await until(lambda: one.swarm.conflict() and copy.swarm.conflict(), "both to know")


async def test_mdns_on_loopback_brings_members_together_and_lists_strangers(tmp_path: Path) -> None:
    devices = [await new_swarm_device(tmp_path / name, mdns=True) for name in ("one", "two")]
    stranger = await new_swarm_device(tmp_path / "odd\x1b[31m", mdns=True)
    await pair(devices)
    for device in [*devices, stranger]:
        await device.start()
    async with stopped_at_end([*devices, stranger]):
        await until(lambda: agreed(devices), "the members to meet")
        for device in devices:
            await until(partial(_is_unpaired, device, stranger), "unpaired")
            view = next(p for p in device.swarm.peers() if p.id == stranger.id)
            assert view.name == "odd[31m"
            assert view.name != short_id(stranger.id)
            assert stranger.id not in device.network.connected()
        await stranger.stop()
        await until(lambda: stranger.id not in devices[0].states(), "the stranger to go")
