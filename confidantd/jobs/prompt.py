"""The tokenizer subprocess of a generating job: keeps the tokenizer out of the daemon."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from confidantd.errors import ModelError, from_wire
from confidantd.jobs.subprocesses import open_log

ANSWER_SECONDS = 60.0  # reading a 128k vocabulary takes a phone some seconds
MAX_LINE_BYTES = 16 * 1024 * 1024


class TextProcess:
    """Encodes a prompt and decodes a stream of tokens; `close` ends the subprocess."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, model: Path, log: Path) -> TextProcess:
        """Start the subprocess for the tokenizer in a model folder."""
        with await asyncio.to_thread(open_log, log) as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "confidantd.jobs.text",
                str(model),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=MAX_LINE_BYTES,
            )
        return cls(process)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the tokenizer's special tokens."""
        return [int(token) for token in (await self._ask({"encode": text}))["ids"]]

    async def push(self, token: int) -> str:
        """The text that one more token completes; may be empty."""
        return str((await self._ask({"push": token}))["text"])

    async def flush(self) -> str:
        """The rest of the text."""
        return str((await self._ask({"flush": True}))["text"])

    async def close(self) -> None:
        """End the subprocess."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
            answer: dict[str, Any] = json.loads(line)
        except (TimeoutError, ConnectionError, ValueError):
            raise ModelError("the tokenizer of the model does not answer") from None
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer
