"""Requests to any device of the swarm, this one included, by one call."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from confidantd.errors import NotAllowedError, ProtocolError
from confidantd.ids import DeviceId, Digest, short_id
from confidantd.jobs.authority import Authority

_log = logging.getLogger(__name__)

Handler = Callable[[DeviceId, dict[str, Any]], Awaitable[dict[str, Any]]]
Listener = Callable[[DeviceId, dict[str, Any]], None]


class Transport(Protocol):
    """What `Peers` needs of the network."""

    def on_request(self, method: str, handler: Handler) -> None: ...

    def on_notify(self, topic: str, handler: Listener) -> None: ...

    async def request(
        self, device: DeviceId, method: str, params: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]: ...

    async def notify(self, device: DeviceId, topic: str, params: dict[str, Any]) -> bool: ...

    async def read_blob(
        self, device: DeviceId, digest: Digest, offset: int, length: int
    ) -> bytes: ...


class Peers:
    """Registers handlers once and calls them directly when the device is this one."""

    def __init__(self, self_id: DeviceId, transport: Transport) -> None:
        self.self_id = self_id
        self._transport = transport
        self.authority = Authority(self_id)
        self._handlers: dict[str, Handler] = {}
        self._listeners: dict[str, Listener] = {}

    def on_request(self, method: str, handler: Handler) -> None:
        """Answer `method` with `handler`, from this device and from others that may ask it."""

        async def guarded(device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
            self.authority.check(device, method, params)
            return await handler(device, params)

        self._handlers[method] = guarded
        self._transport.on_request(method, guarded)

    def on_notify(self, topic: str, listener: Listener) -> None:
        """Give notifications of `topic` to `listener`; those of others than may send them are
        late, or false, and dropped.
        """

        def guarded(device: DeviceId, params: dict[str, Any]) -> None:
            try:
                self.authority.check(device, topic, params)
            except NotAllowedError as failure:
                _log.debug("from %s: %s", short_id(device), failure)
                return
            listener(device, params)

        self._listeners[topic] = guarded
        self._transport.on_notify(topic, guarded)

    async def request(
        self,
        device: DeviceId,
        method: str,
        params: Mapping[str, Any],
        *,
        timeout_seconds: float,
    ) -> dict[str, Any]:
        """The answer of `device`; raises what its handler raised, or `PeerLostError`."""
        if device != self.self_id:
            return await self._transport.request(
                device, method, dict(params), timeout_seconds=timeout_seconds
            )
        handler = self._handlers.get(method)
        if handler is None:
            raise ProtocolError(f"nothing here answers {method}")
        return await handler(self.self_id, dict(params))

    async def notify(self, device: DeviceId, topic: str, params: Mapping[str, Any]) -> bool:
        """Send without waiting for an answer; False if the device is not connected."""
        if device != self.self_id:
            return await self._transport.notify(device, topic, dict(params))
        self._listeners[topic](self.self_id, dict(params))
        return True

    async def read_blob(self, device: DeviceId, digest: Digest, offset: int, length: int) -> bytes:
        """A range of a blob that another device serves."""
        return await self._transport.read_blob(device, digest, offset, length)
