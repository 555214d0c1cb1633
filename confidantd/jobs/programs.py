"""Getting the programs of a job: from the cache, this device's compiler, or a peer's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from confidantd.errors import CompileError, NoCompilerError
from confidantd.ids import DeviceId, Digest
from confidantd.jobs.peers import Peers
from confidantd.jobs.subprocesses import run_module
from confidantd.models.programs import request_key
from confidantd.models.spec import ProgramRequest
from confidantd.store.blobs import BlobStore
from confidantd.store.fetch import fetch
from confidantd.store.files import write_atomically
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import Compiled
from confidantd.wire.stage import ProgramEntry

COMPILE_SECONDS = 900.0  # a board needs minutes for what a laptop does in 15 s
Progress = Callable[[str, int, int], None]


@contextlib.asynccontextmanager
async def _time_limit() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            yield
    except TimeoutError:
        raise CompileError(
            f"compiling took longer than {COMPILE_SECONDS / 60:.0f} minutes",
            "add a faster device with the compiler extra to the swarm",
        ) from None


async def fetch_programs(
    peers: Peers, store: BlobStore, source: DeviceId, programs: Mapping[str, ProgramEntry]
) -> dict[str, Path]:
    """The programs' files on this device, fetched from `source` where they are missing."""
    found = {}
    for name, entry in programs.items():
        found[name] = await fetch(
            store,
            lambda d, offset, length: peers.read_blob(source, d, offset, length),
            entry.digest,
            entry.bytes,
        )
    return found


class Programs:
    """Compiles, caches and serves programs."""

    def __init__(self, peers: Peers, store: BlobStore, home: Path, *, can_compile: bool) -> None:
        self._peers = peers
        self._store = store
        self._home = home
        self._can_compile = can_compile
        self._one_at_a_time = asyncio.Lock()  # a compiler takes over 500 MB
        peers.on_request("programs.compile", self._compile_for_peer)

    def possible(self, compilers: Sequence[DeviceId]) -> bool:
        """Whether this device or another one can compile."""
        return self._can_compile or bool(compilers)

    async def get(
        self, request: ProgramRequest, compilers: Sequence[DeviceId], progress: Progress
    ) -> dict[str, ProgramEntry]:
        """The programs by name, all in the local store afterwards.

        `compilers` are other devices that can compile; `NoCompilerError` if that is
        needed and there is none.
        """
        cached = await asyncio.to_thread(self._cached, request)
        if cached is not None:
            return cached
        if self._can_compile:
            return await self._compile(request, progress)
        if not compilers:
            raise NoCompilerError(
                "no device of the swarm has a compiler",
                'install one on a laptop or desktop: pip install "confidantd[compiler]"',
            )
        return await self._compile_at(compilers[0], request, progress)

    async def _compile_for_peer(self, _device: DeviceId, params: dict[str, Any]) -> dict[str, Any]:
        request = from_map(ProgramRequest, params)
        programs = await self.get(request, (), lambda *_: None)
        return to_map(Compiled(programs))

    async def _compile(
        self, request: ProgramRequest, progress: Progress
    ) -> dict[str, ProgramEntry]:
        async with self._one_at_a_time:
            cached = await asyncio.to_thread(self._cached, request)
            if cached is not None:
                return cached
            with tempfile.TemporaryDirectory(prefix="compile-", dir=self._home) as folder:
                return await self._compile_in(Path(folder), request, progress)

    async def _compile_in(
        self, folder: Path, request: ProgramRequest, progress: Progress
    ) -> dict[str, ProgramEntry]:
        question = folder / "request.json"
        question.write_text(json.dumps(to_map(request)))
        async with _time_limit():
            await run_module(
                "confidantd.compiler",
                [str(question), str(folder / "out")],
                self._home / "logs" / "compiler.log",
                lambda p: progress(str(p["progress"]), int(p["done"]), int(p["of"])),
                CompileError,
            )
        return await asyncio.to_thread(self._adopt, request, folder / "out")

    def _adopt(self, request: ProgramRequest, folder: Path) -> dict[str, ProgramEntry]:
        """Move compiled files into the store and remember them."""
        listed = json.loads((folder / "programs.json").read_text())["programs"]
        programs = {}
        for name, entry in listed.items():
            digest = self._store.put_file(folder / entry["file"])
            programs[name] = ProgramEntry(digest, int(entry["bytes"]))
        self._remember(request, programs)
        return programs

    async def _compile_at(
        self, device: DeviceId, request: ProgramRequest, progress: Progress
    ) -> dict[str, ProgramEntry]:
        progress("at a peer", 0, 1)
        answer = await self._peers.request(
            device, "programs.compile", to_map(request), timeout_seconds=COMPILE_SECONDS
        )
        programs = from_map(Compiled, answer).programs
        await fetch_programs(self._peers, self._store, device, programs)
        await asyncio.to_thread(self._remember, request, programs)
        progress("at a peer", 1, 1)
        return programs

    def _index(self, request: ProgramRequest) -> Path:
        return self._home / "store" / "programs" / f"{request_key(request)}.json"

    def _remember(self, request: ProgramRequest, programs: dict[str, ProgramEntry]) -> None:
        index = self._index(request)
        index.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: to_map(entry) for name, entry in programs.items()}
        write_atomically(index, json.dumps(plain).encode())

    def _cached(self, request: ProgramRequest) -> dict[str, ProgramEntry] | None:
        """Programs remembered from an earlier job, if every blob is still there and whole."""
        try:
            plain = json.loads(self._index(request).read_text())
        except (FileNotFoundError, ValueError):
            return None
        programs = {name: from_map(ProgramEntry, entry) for name, entry in plain.items()}
        there = [self._store.check(Digest(entry.digest)) for entry in programs.values()]
        return programs if all(there) else None
