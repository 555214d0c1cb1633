"""The pipe between a worker and its daemon: commands in, events out."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import BinaryIO

from confidantd.errors import ProtocolError
from confidantd.wire.worker import (
    LENGTH,
    MAX_PIPE_BYTES,
    Command,
    Event,
    command_from,
    decode_message,
    encode_message,
)


class ControlPipe:
    """Reads commands from a file descriptor and writes events to another."""

    def __init__(self, reader: asyncio.StreamReader, output: BinaryIO) -> None:
        self._reader = reader
        self._output = output
        self._writing = threading.Lock()

    @classmethod
    async def standard(cls) -> ControlPipe:
        """Take over this process's standard input and output.

        Whatever else prints to standard output then goes to standard error, so that
        a stray line of a library cannot break the protocol.
        """
        events = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader, events)

    async def receive(self) -> Command | None:
        """The next command; None when the daemon is gone."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if length > MAX_PIPE_BYTES:
                raise ProtocolError(f"a command of {length} bytes is over the limit")
            return command_from(decode_message(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def send(self, event: Event) -> None:
        """Write an event, whole: threads take turns. It is small and the daemon always reads, so
        this blocks for no time.
        """
        with self._writing:
            try:
                self._output.write(encode_message(event))
            except BrokenPipeError:
                return  # the daemon is gone; `receive` says so too and ends the worker

    def close(self) -> None:
        """Close the event side."""
        self._output.close()
