"""mDNS: announces this device on every usable interface and hears others announce themselves.

It only speeds things up. Where it cannot work (no permission, no interface, filtered
multicast) a warning is logged, and the swarm finds its members by their addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from confidantd.discovery.announcement import SERVICE_TYPE, Announcement, from_txt, to_txt
from confidantd.discovery.interfaces import usable_addresses
from confidantd.tasks import TaskSet

_log = logging.getLogger(__name__)

POLL_SECONDS = 3.0  # a changed interface is noticed so fast; asking costs a millisecond
RESOLVE_MILLISECONDS = 3_000
CLOSE_SECONDS = 3.0
# Short enough that the announcement of a device that lost its power goes in two minutes,
# long enough that the refreshing queries (at 75 %) are rare.
RECORD_SECONDS = 120
MAX_SERVICES = 256  # a flood of announcements must not fill the memory

FoundListener = Callable[[Announcement], None]
LostListener = Callable[[Announcement], None]


class MdnsDiscovery:
    """Runs for `hosts` (those the daemon listens on); loopback hosts keep mDNS on loopback."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = tuple(hosts)
        self._own: Announcement | None = None
        self._changed = asyncio.Event()
        self._found: list[FoundListener] = []
        self._lost: list[LostListener] = []
        self._services: dict[str, Announcement] = {}
        self._tasks = TaskSet("mdns")
        self._warned = False
        self.problem = ""  # why it does not work here now

    def watch(self, found: FoundListener, lost: LostListener) -> None:
        """Call `found` for each announcement, new or changed, and `lost` when one goes."""
        self._found.append(found)
        self._lost.append(lost)

    def announce(self, announcement: Announcement) -> None:
        """What to say about this device; its addresses are filled in for each interface set."""
        if announcement != self._own:
            self._own = announcement
            self._changed.set()

    async def run(self) -> None:
        """Announce and browse until cancelled, through every change of interfaces."""
        try:
            while True:
                addresses = await self._wait_for_interfaces()
                try:
                    async with self._zeroconf(addresses) as zeroconf:
                        await self._serve(zeroconf, addresses)
                except (OSError, ZeroconfError) as failure:
                    self._warn(failure)
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            await self._tasks.close()

    async def _wait_for_interfaces(self) -> tuple[str, ...]:
        while True:
            addresses = await asyncio.to_thread(_mdns_addresses, self._hosts)
            if addresses:
                return addresses
            await asyncio.sleep(POLL_SECONDS)

    @contextlib.asynccontextmanager
    async def _zeroconf(self, addresses: tuple[str, ...]) -> AsyncIterator[AsyncZeroconf]:
        zeroconf = AsyncZeroconf(interfaces=list(addresses), ip_version=IPVersion.V4Only)
        browser = None
        try:
            await zeroconf.zeroconf.async_wait_for_start()
            self.problem = ""
            browser = AsyncServiceBrowser(
                zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._service_changed]
            )
            yield zeroconf
        finally:
            self._forget_all()
            with contextlib.suppress(TimeoutError, OSError, ZeroconfError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    if browser is not None:
                        await browser.async_cancel()
                    await zeroconf.async_unregister_all_services()
            with contextlib.suppress(TimeoutError, OSError, ZeroconfError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await zeroconf.async_close()

    async def _serve(self, zeroconf: AsyncZeroconf, addresses: tuple[str, ...]) -> None:
        """Keep the announcement up to date until the usable interfaces change."""
        registered = False
        while await asyncio.to_thread(_mdns_addresses, self._hosts) == addresses:
            if self._changed.is_set() and self._own is not None:
                self._changed.clear()
                info = _service_info(replace(self._own, addresses=addresses))
                if registered:
                    await (await zeroconf.async_update_service(info))
                else:  # without probing: the name is unique by its random instance
                    await (await zeroconf.async_register_service(info, cooperating_responders=True))
                registered = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
        _log.info("the network interfaces changed: announcing anew")
        self._changed.set()

    def _service_changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Called by zeroconf on the loop, by these names."""
        assert service_type == SERVICE_TYPE
        if state_change is ServiceStateChange.Removed:
            self._forget(name)
        elif len(self._services) < MAX_SERVICES or name in self._services:
            self._tasks.start(self._resolve(zeroconf, name), "resolve")

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        try:
            if not await info.async_request(zeroconf, RESOLVE_MILLISECONDS):
                return
        except ZeroconfError as failure:  # closing meanwhile, or a name that cannot be
            _log.debug("%.80r cannot be resolved: %s", name, failure)
            return
        addresses = info.parsed_addresses(IPVersion.V4Only)
        announcement = from_txt(info.properties, addresses, info.port)
        if announcement is None or self._is_own(announcement):
            return
        self._services[name] = announcement
        for listener in self._found:
            listener(announcement)

    def _forget(self, name: str) -> None:
        announcement = self._services.pop(name, None)
        if announcement is not None:
            for listener in self._lost:
                listener(announcement)

    def _forget_all(self) -> None:
        for name in list(self._services):
            self._forget(name)

    def _is_own(self, announcement: Announcement) -> bool:
        return self._own is not None and announcement.instance == self._own.instance

    def _warn(self, failure: Exception) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        self.problem = str(failure) or type(failure).__name__
        _log.log(
            level,
            "mDNS does not work here (%s); devices are found by their addresses (--peer)",
            failure or type(failure).__name__,
        )


def _service_info(own: Announcement) -> AsyncServiceInfo:
    label = f"{own.device_id[:16]}-{own.instance[:12]}"
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{label}.{SERVICE_TYPE}",
        port=own.port,
        properties=to_txt(own),
        server=f"confidant-{label}.local.",
        parsed_addresses=list(own.addresses),
        host_ttl=RECORD_SECONDS,
        other_ttl=RECORD_SECONDS,
    )


def _mdns_addresses(hosts: Sequence[str]) -> tuple[str, ...]:
    """IPv4 addresses to speak mDNS on; a host name or an IPv6 host takes no part."""
    usable = usable_addresses(hosts)
    return tuple(text for text in usable if _is_ipv4(text))


def _is_ipv4(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 4
    except ValueError:
        return False
