"""The tokenizer subprocess of a generating job: keeps the tokenizer out of the daemon."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confidantd.errors import ModelError, from_wire
from confidantd.jobs.subprocesses import open_log

ANSWER_SECONDS = 60.0  # reading a 128k vocabulary takes a phone some seconds
MAX_LINE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Messages:
    """Of a chat, each with its role and its content."""

    messages: tuple[Mapping[str, str], ...]


Prompt = str | Sequence[int] | Messages


class TextProcess:
    """Encodes prompts and decodes streams of tokens; `close` ends the subprocess. Each text has a
    number.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._one_at_a_time, self._broken = asyncio.Lock(), False

    @classmethod
    async def start(cls, model: Path, log: Path, template: str | None = None) -> TextProcess:
        """Start the subprocess for the tokenizer in a model folder; `template` is a file with
        another chat template than the model's.
        """
        arguments = [str(model), *([template] if template is not None else [])]
        with await asyncio.to_thread(open_log, log) as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "confidantd.jobs.text",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=MAX_LINE_BYTES,
            )
        return cls(process)

    async def begin(self, number: int, prompt: Prompt, most: int | None = None) -> list[int]:
        """Token ids of a prompt; a text with the tokenizer's special tokens. `DataError` if they
        are more than `most`.
        """
        match prompt:
            case str():
                given: dict[str, Any] = {"text": prompt}
            case Messages():
                given = {"messages": prompt.messages}
            case _:
                given = {"ids": prompt}
        question = {"begin": number, "most": most, **given}
        return [int(token) for token in (await self._ask(question))["ids"]]

    async def push(self, tokens: Sequence[tuple[int, int]]) -> list[str]:
        """The text that one more token completes, for numbers and tokens; may be empty."""
        return [str(text) for text in (await self._ask({"push": tokens}))["texts"]]

    async def look(self, ids: Sequence[int]) -> list[str]:
        """What single tokens look like, special ones included."""
        return [str(text) for text in (await self._ask({"look": list(ids)}))["texts"]]

    async def end(self, number: int) -> str:
        """The rest of a text."""
        return str((await self._ask({"end": number}))["text"])

    async def close(self) -> None:
        """End the subprocess."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Who asks and is cancelled waits for the answer: the next one gets its own."""
        asking = asyncio.ensure_future(self._ask_in_turn(question))
        try:
            answer = await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        if "error" in answer:
            raise from_wire(answer["error"])
        return answer

    async def _ask_in_turn(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._one_at_a_time:
            if self._broken:
                raise ModelError("the tokenizer of the model has ended", "see logs/text.log")
            self._broken = True  # until the answer is there: the next one would get this one's
            try:
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._process.stdin.drain()
                    line = await self._process.stdout.readline()
                answer: dict[str, Any] = json.loads(line)
            except (TimeoutError, ConnectionError, ValueError):
                if self._process.returncode is None:
                    self._process.kill()
                raise ModelError("the tokenizer of the model does not answer") from None
            self._broken = False
        return answer
