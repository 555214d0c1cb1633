"""TLS contexts that follow the trust store: built off the loop, kept until trust changes."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from confidantd.errors import NotPairedError
from confidantd.identity.trust import TrustStore
from confidantd.ids import DeviceId
from confidantd.net.tls import client_context, own_certificate, server_context, trusted_roots


class Contexts:
    """`listening` and `dialling` trust every member; `to(device)` trusts that one alone."""

    def __init__(self, home: Path, trust: TrustStore) -> None:
        self._home = home
        self._trust = trust
        self._version = 0
        self._cache: dict[str, tuple[int, ssl.SSLContext]] = {}

    def forget(self) -> None:
        """Trust changed: what was built before is no longer used."""
        self._version += 1
        self._cache.clear()

    async def listening(self) -> ssl.SSLContext:
        """For the next incoming connection."""
        return await self._get("listening", None)

    async def dialling(self) -> ssl.SSLContext:
        """For a connection to a device whose id shows only afterwards."""
        return await self._get("dialling", None)

    async def to(self, device: DeviceId) -> ssl.SSLContext:
        """For a connection that only `device` can answer; `NotPairedError` if it is no member."""
        pem = self._trust.members().get(device)
        if pem is None:
            raise NotPairedError("the device is not a member of this swarm")
        return await self._get(device, [pem])

    async def _get(self, key: str, roots: list[str] | None) -> ssl.SSLContext:
        kept = self._cache.get(key)
        if kept is not None and kept[0] == self._version:
            return kept[1]
        version = self._version
        context = await asyncio.to_thread(self._build, key, roots)
        if version == self._version:
            self._cache[key] = (version, context)
        return context

    def _build(self, key: str, roots: list[str] | None) -> ssl.SSLContext:
        if key == "listening":
            return server_context(self._home, trusted_roots(self._home, self._trust))
        if roots is None:
            roots = [*self._trust.members().values(), own_certificate(self._home)]
        return client_context(self._home, roots)
