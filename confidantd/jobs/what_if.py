"""Fleets that are not here: a TOML file of devices and links, to plan for.

mbps = 50                # of every device's radio, unless it says otherwise
round_trip_ms = 5        # between any two devices

[[device]]
name = "phone"
count = 3                # phone-1, phone-2, phone-3
memory = "2G"            # what jobs may use
gflops = 12              # float32 products, as `confidant doctor` measures them
mbps = 20
owner = true             # has the data; the first device if none says so

[[link]]                 # one pair that differs; what it does not say is that of the radios
between = ["phone-1", "phone-3"]
mbps = 5
round_trip_ms = 40
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confidantd.config import parse_size
from confidantd.errors import ConfigError, DeviceError, UsageError
from confidantd.ids import DeviceId, digest_of
from confidantd.jobs.plan_inputs import cut_requests, cuts_of
from confidantd.jobs.request_checks import MOST_DEVICES
from confidantd.planner.costs import PlanDevice
from confidantd.planner.plan import Plan, choose_plan
from confidantd.wire.jobs import PlanRequest
from confidantd.wire.links import Link

LISTED = 8  # names in a hint
MOST_BYTES = 1024 * 1024  # of the file
MAX_NAME_CHARACTERS = 64
_FLEET = {"mbps", "round_trip_ms", "device", "link"}
_LINK = {"between", "mbps", "round_trip_ms"}
_DEVICE = {"name", "count", "memory", "gflops", "mbps", "round_trip_ms", "owner"}
_EXAMPLE = 'write [[device]] with name = "phone", memory = "2G" and gflops = 12'


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices to plan for, and the one that has the data."""

    devices: tuple[PlanDevice, ...]
    owner: DeviceId

    def only(self, names: tuple[str, ...]) -> Fleet:
        """Just the named devices, all if there are none; DeviceError names an unknown one."""
        if not names:
            return self
        by_name = {device.name: device for device in self.devices}
        for name in names:
            if name not in by_name:
                message = f"there is no device {name[:64]} in the what-if file"
                raise DeviceError(message, f"it has {_some(by_name)}")
        chosen = tuple(by_name[name] for name in dict.fromkeys(names))
        owner = self.owner if any(d.id == self.owner for d in chosen) else chosen[0].id
        return Fleet(chosen, owner)


def read_fleet(path: str) -> Fleet:
    """The fleet in a file; UsageError names the file and what is wrong in it."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UsageError(f"{path} is over the limit of {MOST_BYTES} bytes")
        return fleet_from(tomllib.loads(data.decode()))
    except OSError as failure:
        raise UsageError(f"the what-if file {path}: {failure.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as failure:
        raise UsageError(f"{path} is not TOML ({failure})", _EXAMPLE) from None
    except _WrongError as failure:
        raise UsageError(f"{path}: {failure}", _EXAMPLE) from None


class _WrongError(ValueError):
    """What is wrong in a fleet."""


def plan_for(path: str, request: PlanRequest) -> Plan:
    """The plan for the fleet of a file, or for those of it that the request names."""
    fleet = read_fleet(path).only(request.devices)
    return choose_plan(
        cuts_of(cut_requests(request), fleet.devices, {}),
        fleet.owner,
        count=request.microbatches,
        use_all=bool(request.devices),
        layers=request.layers,
        ends=request.owner_ends,
        explained=request.explain,
    )


def fleet_from(fields: Mapping[str, Any]) -> Fleet:
    """The fleet of a parsed file; ValueError says what is wrong."""
    _check_keys("the file", fields, _FLEET)
    listed = fields.get("device")
    if not isinstance(listed, list) or not listed:
        raise _WrongError("there is no [[device]]")
    common = {key: fields[key] for key in ("mbps", "round_trip_ms") if key in fields}
    for key in common:
        _positive("the file", fields, key)
    devices: list[PlanDevice] = []
    owners: list[DeviceId] = []
    for index, entry in enumerate(listed, 1):
        if not isinstance(entry, dict):
            raise _WrongError("write [[device]], not a list of values")
        for device in _devices(index, {**common, **entry}):
            if len(devices) == MOST_DEVICES:
                raise _WrongError(f"more than {MOST_DEVICES} devices")
            devices.append(device)
            if _flag(device.name, entry):
                owners.append(device.id)
    if len(owners) > 1:
        raise _WrongError("more than one device is the owner")
    names = [device.name for device in devices]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _WrongError(f"two devices have the same name, {twice}")
    linked = _linked(devices, fields.get("link", []))
    return Fleet(linked, owners[0] if owners else devices[0].id)


def _devices(index: int, entry: Mapping[str, Any]) -> Iterator[PlanDevice]:
    """The devices of one entry."""
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise _WrongError(f"device {index} has no name of 1 to {MAX_NAME_CHARACTERS} characters")
    _check_keys(f"device {name}", entry, _DEVICE)
    count = entry.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_DEVICES:
        raise _WrongError(f"device {name}: count is not a whole number of 1 to {MOST_DEVICES}")
    try:
        written = entry["memory"]
        memory = parse_size(written if isinstance(written, str) else "")
    except (KeyError, ConfigError):
        raise _WrongError(f'device {name} has no memory like "2G" or "512M"') from None
    gflops = _positive(f"device {name}", entry, "gflops")
    if gflops is None:
        raise _WrongError(f"device {name} has no gflops, its speed")
    trip = _positive(f"device {name}", entry, "round_trip_ms")
    for number in range(1, count + 1):
        each = name if count == 1 else f"{name}-{number}"
        yield PlanDevice(
            id=DeviceId(digest_of(each.encode())),
            name=each,
            available_bytes=memory,
            gflops=gflops,
            bandwidth_mbps=_positive(f"device {name}", entry, "mbps"),
            round_trip_seconds=None if trip is None else trip / 1000,
        )


def _linked(devices: list[PlanDevice], entries: Any) -> tuple[PlanDevice, ...]:
    """The devices with the links that single pairs have."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _WrongError("write [[link]], not a value")
    by_name = {device.name: device for device in devices}
    found: dict[DeviceId, dict[DeviceId, Link]] = {}
    for index, entry in enumerate(entries, 1):
        _check_keys(f"link {index}", entry, _LINK)
        first, second = _ends(index, entry, by_name)
        where = f"the link between {first.name} and {second.name}"
        if second.id in found.get(first.id, {}) or first.id in found.get(second.id, {}):
            raise _WrongError(f"{where} is there twice")
        link = Link(_positive(where, entry, "mbps"), _positive(where, entry, "round_trip_ms"))
        if link == Link():
            raise _WrongError(f"{where} has neither mbps nor round_trip_ms")
        found.setdefault(first.id, {})[second.id] = link
    return tuple(replace(device, links=found.get(device.id, {})) for device in devices)


def _ends(
    index: int, entry: Mapping[str, Any], by_name: Mapping[str, PlanDevice]
) -> tuple[PlanDevice, PlanDevice]:
    names = entry.get("between")
    if not isinstance(names, list) or len(names) != 2:
        raise _WrongError(f'link {index} has no between = ["one device", "another"]')
    for name in names:
        if not isinstance(name, str) or name not in by_name:
            said = f"link {index}: there is no device {str(name)[:40]!r}"
            raise _WrongError(f"{said}; the file has {_some(by_name)}")
    if names[0] == names[1]:
        raise _WrongError(f"link {index} is between {names[0]} and itself")
    return by_name[names[0]], by_name[names[1]]


def _some(names: Iterable[str]) -> str:
    """A list for a hint."""
    found = list(names)
    return ", ".join(found[:LISTED]) + (", ..." if len(found) > LISTED else "")


def _positive(where: str, entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongError(f"{where}: {key} is not a number")
    if not 0 < value < math.inf:
        raise _WrongError(f"{where}: {key} must be over 0")
    return float(value)


def _flag(name: str, entry: Mapping[str, Any]) -> bool:
    value = entry.get("owner", False)
    if not isinstance(value, bool):
        raise _WrongError(f"device {name}: owner is not true or false")
    return value


def _check_keys(where: str, fields: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        raise _WrongError(f"{where} has an unknown key {unknown[0][:40]!r}")
