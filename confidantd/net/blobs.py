"""Content-addressed blobs over HTTPS: `GET /v1/blobs/{digest}` with a byte range."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import Counter
from pathlib import Path
from typing import Protocol

import aiohttp
from aiohttp import web

from confidantd.errors import NotPairedError, PeerLostError, StorageError
from confidantd.ids import DeviceId, Digest, is_digest
from confidantd.net.dialer import FORBIDDEN, bracketed, translated

BLOB_PATH = "/v1/blobs"
MAX_RANGE_BYTES = 4 * 1024 * 1024
READ_SECONDS = 60.0  # 4 MiB at 0.6 Mbit/s
_CHUNK_BYTES = 512 * 1024  # what a response holds in memory
# Says that the sender served another device when this response began: its time is no link's.
SHARED_HEADER = "Confidant-Shared"
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?")


class BlobSource(Protocol):
    """Where the bytes of a digest lie on this device."""

    def locate(self, digest: Digest) -> tuple[Path, int, int] | None:
        """(file, offset, length), or None if the digest is not here. Called in a thread."""
        ...


def byte_range(header: str | None, length: int) -> tuple[int, int] | None:
    """First and past-last byte of a Range header; None if nothing of it can be served."""
    if header is None:
        return 0, length
    match = _RANGE.fullmatch(header.strip())
    if match is None:
        return None
    first = int(match[1])
    past_last = length if match[2] is None else min(int(match[2]) + 1, length)
    return (first, past_last) if first < past_last else None


class BlobServer:
    """Serves what a `BlobSource` locates; files are read off the loop."""

    def __init__(self, source: BlobSource) -> None:
        self._source = source
        self._served: Counter[DeviceId] = Counter()

    @property
    def running(self) -> bool:
        """Whether any response is under way."""
        return bool(self._served)

    async def handle(self, request: web.Request, device: DeviceId) -> web.StreamResponse:
        """The aiohttp handler of `GET /v1/blobs/{digest}`, asked by `device`."""
        digest = request.match_info["digest"]
        found = None
        if is_digest(digest):
            found = await asyncio.to_thread(self._source.locate, Digest(digest))
        if found is None:
            raise web.HTTPNotFound
        path, offset, length = found
        part = byte_range(request.headers.get("Range"), length)
        if part is None:
            raise web.HTTPRequestRangeNotSatisfiable
        response = web.StreamResponse(status=206 if "Range" in request.headers else 200)
        self._served[device] += 1
        if len(self._served) > 1:
            response.headers[SHARED_HEADER] = "1"
        try:
            return await _send(request, response, path, offset, part, length)
        finally:
            self._served[device] -= 1
            self._served += Counter()  # drops who is served no longer


async def _send(
    request: web.Request,
    response: web.StreamResponse,
    path: Path,
    offset: int,
    part: tuple[int, int],
    length: int,
) -> web.StreamResponse:
    first, past_last = part
    response.content_type = "application/octet-stream"
    response.content_length = past_last - first
    response.headers["Content-Range"] = f"bytes {first}-{past_last - 1}/{length}"
    chunk = await _chunk(path, offset, first, past_last)
    await response.prepare(request)
    while chunk:
        await response.write(chunk)
        first += len(chunk)
        chunk = await _chunk(path, offset, first, past_last)
    await response.write_eof()
    return response


async def _chunk(path: Path, offset: int, first: int, past_last: int) -> bytes:
    size = min(_CHUNK_BYTES, past_last - first)
    if size == 0:
        return b""
    try:
        data = await asyncio.to_thread(_read, path, offset + first, size)
    except OSError:
        raise web.HTTPNotFound from None
    if len(data) != size:  # the file shrank: the announced length must not be filled up
        raise web.HTTPNotFound
    return data


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


async def read_range(
    session: aiohttp.ClientSession,
    context: ssl.SSLContext,
    address: tuple[str, int],
    digest: Digest,
    *,
    offset: int,
    length: int,
) -> tuple[bytes, bool]:
    """`length` bytes (at most 4 MiB) of a blob from the device at `address`, and whether it
    served another device at the same time.

    `StorageError` if the device lacks the blob, `PeerLostError` if it does not answer.
    """
    if not 0 < length <= MAX_RANGE_BYTES:
        raise ValueError(f"a range of {length} bytes")
    host, port = address
    where = f"{host}:{port}"
    headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
    url = f"https://{bracketed(host)}:{port}{BLOB_PATH}/{digest}"
    async with (
        translated(where, READ_SECONDS),
        session.get(url, ssl=context, headers=headers) as response,
    ):
        if response.status == FORBIDDEN:
            raise NotPairedError(f"the device at {where} does not know this one")
        if response.status != 206:
            raise StorageError(f"{where} does not have the data {digest[:12]} (any more)")
        shared = SHARED_HEADER in response.headers
        data = await response.content.read(length + 1)
        while len(data) <= length and not response.content.at_eof():
            data += await response.content.read(length + 1 - len(data))
    if len(data) != length:
        raise PeerLostError(f"{where} sent {len(data)} bytes instead of {length}")
    return data, shared
