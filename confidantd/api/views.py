"""The JSON of the contract, from what the daemon's parts know."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import confidantd
from confidantd.api.checks import check, check_links, check_readiness
from confidantd.errors import DeviceError, IdentityConflictError, NotPairedError
from confidantd.identity.certificate import Identity
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId, short_id
from confidantd.profile.providers import Provider
from confidantd.swarm.addresses import format_address, typed_address
from confidantd.swarm.diagnosis import findings
from confidantd.swarm.service import Swarm
from confidantd.swarm.state import PeerView

ONNXRUNTIME_BUILDS = (  # of which one fills the folder that all are imported from
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu", "onnxruntime-openvino",
    "onnxruntime-qnn",
)  # fmt: skip


class View:
    """Read-only answers about this device and its swarm, and changes to its members."""

    def __init__(
        self,
        identity: Identity,
        name: str,
        trust: TrustStore,
        swarm: Swarm,
        address: Callable[[], str],
        providers: Callable[[], tuple[Provider, ...]],
        leave: Callable[[], Awaitable[int]],
    ) -> None:
        self._identity = identity
        self._name = name
        self._trust = trust
        self._swarm = swarm
        self._address = address
        self._providers = providers
        self._leave = leave

    def status(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        """`confidant status`."""
        coordinator = self._swarm.coordinator()
        me = self._self_view()
        resources = me.resources
        return {
            "device": {
                "id": self._identity.device_id,
                "short_id": short_id(self._identity.device_id),
                "name": self._name,
            },
            "version": confidantd.__version__,
            "address": self._address(),
            "swarm": {"tag": self._swarm.tag(), "members": len(self._trust.members()) + 1},
            "coordinator": coordinator
            and {"id": coordinator.id, "name": coordinator.name, "term": coordinator.term},
            "memory": {
                "total_bytes": resources.memory_bytes if resources else 0,
                "available_bytes": resources.available_bytes if resources else 0,
                "granted_bytes": resources.granted_bytes if resources else 0,
            },
            "jobs": jobs,
            "conflict": self._swarm.conflict(),
        }

    def peers(self) -> dict[str, Any]:
        """`confidant peers`."""
        return {
            "peers": [_peer(peer) for peer in self._swarm.peers()],
            "conflict": self._swarm.conflict(),
        }

    def members(self) -> dict[str, Any]:
        """`confidant members`: this device and the certificates it trusts."""
        names = {peer.id: peer.name for peer in self._swarm.peers()}
        ids = [self._identity.device_id, *sorted(self._trust.members())]
        return {
            "members": [
                {
                    "id": device,
                    "short_id": short_id(device),
                    "name": names.get(device, ""),
                    "self": device == self._identity.device_id,
                    "let_in_by": self._named(sorted(self._trust.introducers(device) & {*ids})),
                }
                for device in ids
            ]
        }

    def certificate(self) -> dict[str, Any]:
        """What another device needs in order to trust this one."""
        return {
            "pem": self._identity.certificate_pem,
            "id": self._identity.device_id,
            "short_id": short_id(self._identity.device_id),
            "name": self._name,
        }

    async def add_member(self, pem: str) -> dict[str, Any]:
        """Trust a certificate from now on."""
        device = await asyncio.to_thread(self._trust.add, pem)
        return {"id": device, "short_id": short_id(device), "name": ""}

    async def remove_member(self, which: str) -> dict[str, Any]:
        """Take a device, named by id, short id or name, out of the swarm; ends its connections."""
        device = self._find_member(which)
        let_in = sorted(self._trust.depending_on(device))
        await self._swarm.pairing.remove(device)
        return {"id": device, "short_id": short_id(device), "let_in": self._named(let_in)}

    async def invite(self) -> dict[str, Any]:
        """`confidant invite`: a fresh code, and where a device can join that hears no mDNS."""
        invitation = await self._swarm.pairing.invite()
        left = invitation.expires - asyncio.get_running_loop().time()
        port = self._swarm.pairing.inviting.port
        host, _ = typed_address(self._address())
        return {
            "code": str(invitation.code),
            "expires_at": time.time() + left,
            "address": format_address(host, port),
            **self._own_names(),
        }

    def invitation(self) -> dict[str, Any]:
        """How the last invitation stands."""
        inviting = self._swarm.pairing.inviting
        if inviting.invitation is None:
            raise NotPairedError("nobody was invited yet", "confidant invite")
        now = asyncio.get_running_loop().time()
        invitation = inviting.invitation.at(now)
        return {
            "number": invitation.code.number,
            "outcome": invitation.outcome,
            "wrong": invitation.wrong,
            "seconds_left": max(0.0, invitation.expires - now),
            "device": inviting.last and _names(inviting.last.device, inviting.last.name),
        }

    async def withdraw(self) -> dict[str, Any]:
        """Close the open invitation."""
        await self._swarm.pairing.inviting.withdraw()
        return {}

    async def join(self, code: str, at: str, *, merge: bool) -> dict[str, Any]:
        """`confidant join`: pair with the device that shows the code."""
        joined = await self._swarm.pairing.join(code, at, merge=merge)
        return {**_names(joined.device, joined.name), "self": self._own_names()}

    async def leave(self) -> dict[str, Any]:
        """`confidant leave`: this device is on its own afterwards."""
        return {"left_members": await self._leave()}

    def _own_names(self) -> dict[str, str]:
        return _names(self._identity.device_id, self._name)

    async def doctor(self) -> dict[str, Any]:
        """`confidant doctor`: what is there, what is missing, what to do."""
        network = findings(await self._swarm.network_facts())
        me = self._self_view()
        roles = me.resources.roles if me.resources else ()
        providers = self._providers()
        peers = self._swarm.peers()
        alive = [p for p in peers if p.state == "alive" and not p.is_self]
        checks = [
            _check_identity(self._swarm.conflict()),
            _check_onnxruntime(),
            _check_compiler("compiler" in roles, alive),
            *_check_providers(providers),
            _check_peers(len(self._trust.members()), len(alive)),
            *(check(f.name, f.state, f.message, f.hint) for f in network),
            check_readiness(me.resources),
            *check_links([p for p in peers if p.state == "alive"]),
            _check_coordinator(self._swarm.coordinator() is not None),
        ]
        return {"checks": checks, "providers": [provider.to_json() for provider in providers]}

    def _named(self, devices: Iterable[DeviceId]) -> list[dict[str, str]]:
        names = {peer.id: peer.name for peer in self._swarm.peers()}
        return [_names(device, names.get(device, "")) for device in devices]

    def _self_view(self) -> PeerView:
        return next(peer for peer in self._swarm.peers() if peer.is_self)

    def _find_member(self, which: str) -> DeviceId:
        members, names = self._trust.members(), {p.id: p.name for p in self._swarm.peers()}
        if which in (self._identity.device_id, short_id(self._identity.device_id)):
            raise DeviceError("this is this very device", "it goes itself: confidant leave")
        exact = [device for device in members if which in (device, short_id(device))]
        found = exact or [device for device in members if names.get(device) == which]
        if len(found) > 1:
            ids = ", ".join(short_id(device) for device in found)
            raise DeviceError(f"several members are called {which[:64]}", f"name one by id: {ids}")
        if not found and which == self._name:
            raise DeviceError("this is this very device", "it goes itself: confidant leave")
        if not found:
            raise DeviceError(f"{which[:64]} is not a member", "see `confidant members`")
        return found[0]


def _names(device: DeviceId, name: str) -> dict[str, str]:
    return {"id": device, "short_id": short_id(device), "name": name}


def _peer(peer: PeerView) -> dict[str, Any]:
    resources = peer.resources
    power = None
    if resources is not None and resources.charging is not None:
        power = {"charging": resources.charging, "percent": resources.battery_percent}
    return {
        "id": peer.id,
        "short_id": short_id(peer.id),
        "name": peer.name,
        "self": peer.is_self,
        "state": peer.state,
        "address": peer.address,
        "round_trip_ms": peer.round_trip_ms,
        "bandwidth_mbps": None if peer.bandwidth_mbps is None else round(peer.bandwidth_mbps, 2),
        "memory_bytes": resources.memory_bytes if resources else None,
        "available_bytes": resources.available_bytes if resources else None,
        "gflops": resources.gflops if resources else None,
        "backends": list(resources.backends) if resources else [],
        "roles": list(resources.roles) if resources else [],
        "power": power,
        "temperature_celsius": resources.temperature_celsius if resources else None,
        "refuses": resources.refuses if resources else "",
    }


def _check_identity(conflict: str | None) -> dict[str, str]:
    if conflict is None:
        return check("identity", "ok", "no other device uses this one's identity")
    failure = IdentityConflictError(conflict)
    return check("identity", "fail", failure.message, failure.hint)


def _check_onnxruntime() -> dict[str, str]:
    found = {}
    for package in ONNXRUNTIME_BUILDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if not found:
        message = "not installed: this device cannot hold a stage"
        return check("onnxruntime", "fail", message, "pip install onnxruntime")
    listed = " and ".join(f"version {version} ({package})" for package, version in found.items())
    if len(found) == 1:
        return check("onnxruntime", "ok", listed)
    wanted = next(package for package in found if package != ONNXRUNTIME_BUILDS[0])
    hint = (
        f"pip uninstall {' '.join(found)}, then pip install --no-deps {wanted} "
        f"(or {ONNXRUNTIME_BUILDS[0]})"
    )
    return check("onnxruntime", "warn", f"{listed} overwrite each other", hint)


def _check_compiler(here: bool, alive: list[PeerView]) -> dict[str, str]:
    if here:
        return check("compiler", "ok", "this device can compile programs")
    able = [p.name for p in alive if p.resources and "compiler" in p.resources.roles]
    if able:
        return check("compiler", "ok", f"{able[0]} compiles for this device")
    return check(
        "compiler",
        "warn",
        "no device that is alive can compile programs",
        'on one laptop or desktop: pip install "confidantd[compiler]"',
    )


def _check_providers(providers: tuple[Provider, ...]) -> list[dict[str, str]]:
    """One line each: those that compute first, then what is broken, then what could be added."""
    if not providers:
        return [check("provider cpu", "warn", "it is not measured yet", "wait a few seconds")]
    ranked = sorted(providers, key=lambda p: (not p.present, not p.broken))
    return [_check_provider(provider) for provider in ranked]


def _check_provider(provider: Provider) -> dict[str, str]:
    name = f"provider {provider.name}"
    if not provider.present:
        state = "warn" if provider.broken else "none"
        return check(name, state, provider.problem, provider.hint)
    device = provider.devices[0].name if provider.devices else "unnamed device"
    speed = f"{provider.gflops or 0:.3g} GFLOP/s (float32 matrix product)"
    return check(name, "ok", f"{device}, {speed}, version {provider.version}")


def _check_peers(members: int, alive: int) -> dict[str, str]:
    if not members:
        return check(
            "peers",
            "warn",
            "this device is paired with no other",
            "confidant invite here and confidant join CODE there, or the other way round",
        )
    state = "ok" if alive else "warn"
    hint = "" if alive else "start confidantd there, or give its address with --peer HOST:PORT"
    return check("peers", state, f"{alive} of {members} paired devices are alive", hint)


def _check_coordinator(there: bool) -> dict[str, str]:
    if there:
        return check("coordinator", "ok", "elected")
    return check("coordinator", "warn", "none yet", "an election takes a few seconds")
