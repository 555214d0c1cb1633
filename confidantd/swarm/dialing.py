"""Keeps a connection to every member, by whatever address works. Presence hangs on no channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

from confidantd.errors import (
    ConfidantError,
    IdentityConflictError,
    NotPairedError,
    PeerRefusedError,
    ProtocolError,
    UnexpectedDeviceError,
)
from confidantd.ids import DeviceId
from confidantd.net.network import Network
from confidantd.swarm.addresses import AddressBook, format_address, parse_address
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
TYPED_PAUSE_SECONDS = 5.0  # for an address a person typed: someone may be waiting for it
# The device with the greater id dials a little later, so that most pairs make one connection.
POLITE_SECONDS = 0.4


class Dialing:
    """One task per member and one per typed address; `refused` hears of members that are down."""

    def __init__(
        self, network: Network, book: AddressBook, refused: Callable[[DeviceId], None]
    ) -> None:
        self._network = network
        self._book = book
        self._refused = refused
        self._tasks = TaskSet("dial")
        self._members: dict[DeviceId, asyncio.Task[None]] = {}
        self._nudges: dict[DeviceId, asyncio.Event] = {}
        self._random = random.Random()  # noqa: S311 - spreads attempts in time, protects nothing
        self._said: set[str] = set()
        # The last failure at each address of a member, and at addresses that a person gave.
        self.failures: dict[DeviceId, dict[str, ConfidantError]] = {}
        self.typed: dict[str, ConfidantError] = {}

    def start_typed(self, host: str, port: int) -> None:
        """Try an address that a person gave until a device answers, and again when it is lost."""
        self._tasks.start(self._keep_typed(host, port), f"typed-{host}-{port}")

    def follow(self, members: set[DeviceId]) -> None:
        """Dial exactly these devices from now on."""
        for device in set(self._members) - members:
            self._members.pop(device).cancel()
            self.failures.pop(device, None)
            self._nudges.pop(device, None)
        for device in members - set(self._members):
            self._nudges[device] = asyncio.Event()
            self._members[device] = self._tasks.start(self._keep(device), device[:8])

    def nudge(self, device: DeviceId) -> None:
        """Something suggests that the device is there now: try at once."""
        if device in self._nudges:
            self._nudges[device].set()

    async def close(self) -> None:
        """Dial no more."""
        await self._tasks.close()

    async def _keep(self, device: DeviceId) -> None:
        nudge = self._nudges[device]
        pause = FIRST_PAUSE_SECONDS
        if self._network.identity.device_id > device:
            await asyncio.sleep(POLITE_SECONDS)
        while True:
            connected = device in self._network.connected() or await self._try(device)
            if connected:
                pause = LONGEST_PAUSE_SECONDS  # a lost connection nudges
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * self._random.uniform(0.8, 1.2)):
                    await nudge.wait()
            if nudge.is_set():
                pause = FIRST_PAUSE_SECONDS
                nudge.clear()
            else:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _try(self, device: DeviceId) -> bool:
        """Dial the addresses of a member, the most promising first; True if one worked."""
        tried: set[str] = set()
        refused = 0
        failures: dict[str, ConfidantError] = {}
        while address := self._next_address(device, tried):
            tried.add(address)
            host, port = parse_address(address) or ("", 0)
            try:
                await self._network.connect(host, port, device)
            except PeerRefusedError as failure:
                refused += 1
                failures[address] = failure
            except UnexpectedDeviceError as failure:
                self._book.drop(device, address)
                failures[address] = failure
                self._say(address, failure)
            except ConfidantError as failure:
                failures[address] = failure
                self._say(address, failure)
            else:
                self._book.put_first(device, [address])
                return True
            if device in self._network.connected():  # it reached us meanwhile
                return True
        self.failures[device] = failures
        if tried and refused == len(tried):
            self._refused(device)
        return False

    def _next_address(self, device: DeviceId, tried: set[str]) -> str | None:
        """Asked anew each time: an announcement may have put a better one in front."""
        return next((a for a in self._book.get(device) if a not in tried), None)

    async def _keep_typed(self, host: str, port: int) -> None:
        address = format_address(host, port)
        pause, device = FIRST_PAUSE_SECONDS, None
        while True:
            try:
                if device is None or device not in self._network.connected():
                    device = await self._network.connect(host, port, None)
                    self.typed.pop(address, None)
                    pause = TYPED_PAUSE_SECONDS
                    self._book.put_first(device, [address])
                if device == self._network.identity.device_id:
                    _log.info("--peer %s is this device itself", address)
                    return
            except ConfidantError as failure:
                self.typed[address] = failure
                self._say(address, failure)
                pause = min(1.5 * pause, TYPED_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    def _say(self, address: str, failure: ConfidantError) -> None:
        """What a person should know is a warning, once per address; the rest is for debugging."""
        key = f"{address} {failure.code}"
        serious = isinstance(failure, NotPairedError | ProtocolError)
        if isinstance(failure, IdentityConflictError):
            serious = False  # said by the watch for copied homes
        if serious and key not in self._said:
            self._said.add(key)
            _log.warning("%s", failure)
        else:
            _log.debug("%s: %s", address, failure)
