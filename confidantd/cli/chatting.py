"""`confidant chat`: questions and answers in turn, with the chat so far."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import click

from confidantd.cli.client import Client
from confidantd.cli.generating import printable
from confidantd.cli.option_types import path
from confidantd.cli.output import plain, print_error, print_json
from confidantd.cli.serving import until_served
from confidantd.errors import ConfidantError, ModelNotFoundError, PromptTooLongError, UsageError
from confidantd.models.imported import is_file_model

PROMPT = "> "
HELP = "/clear begins anew, /exit or Ctrl-D ends the chat, Ctrl-C stops an answer"
DEFAULT_TEMPERATURE = 0.7
Message = dict[str, str]


async def run_chat(
    client: Client,
    model: str,
    served: Mapping[str, Any],
    asked: Mapping[str, Any],
    system: str | None,
    *,
    as_json: bool,
) -> None:
    """Until the input ends. The model is served for as long, unless it is served already."""
    async with _served(client, model, served, as_json=as_json) as name:
        request = {"model": name, "temperature": DEFAULT_TEMPERATURE, **asked}
        if "max_new_tokens" in request:
            request["max_completion_tokens"] = request.pop("max_new_tokens")
        await _Chat(client, request, system, as_json=as_json).run()


@asynccontextmanager
async def _served(
    client: Client, model: str, options: Mapping[str, Any], *, as_json: bool
) -> AsyncIterator[str]:
    """The name that the model answers to."""
    known = (await client.get("/v1/models"))["data"]
    folder = path(model)
    names = [
        m["id"]
        for m in known
        if m["id"] == model or (m["parent"], m["root"]) == (None, str(folder))
    ]
    if names and not options:
        yield names[0]
    elif model in names:
        raise UsageError(
            f"{model} is served already, with options of its own",
            "leave yours out, or give a folder",
        )
    elif not folder.is_dir() and not is_file_model(str(folder)):
        raise ModelNotFoundError(
            f"there is neither a model folder {model} nor a model of that name that is served",
            "give a folder with config.json, *.safetensors and tokenizer files, or a .gguf file",
        )
    else:
        taken = {m["id"] for m in known}
        name = f"{folder.name}-chat-{os.getpid()}" if folder.name in taken else folder.name
        request = {"requests": 1, "private": True, "name": name, **options, "model": str(folder)}
        async with aclosing(client.stream("POST", "/v1/serve", request)) as events:
            event = await until_served(events, as_json=as_json)
            yield event["model"]


class _Chat:
    """The messages so far, and what comes next."""

    def __init__(
        self, client: Client, request: Mapping[str, Any], system: str | None, *, as_json: bool
    ) -> None:
        self._client, self._request, self._as_json = client, request, as_json
        self._start: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self._messages = list(self._start)
        self._in_terminal = sys.stdin.isatty() and not as_json

    async def run(self) -> None:
        """Answer every line of the input."""
        if self._in_terminal:
            click.echo(HELP, err=True)
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # lets one edit lines, and look back
        while (line := self._line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case "/clear":
                    self._messages = list(self._start)
                case text:
                    await self._answer(text)

    def _line(self) -> str | None:
        """The next line, None at the end; nothing else runs meanwhile. Ctrl-C drops the line."""
        if not self._in_terminal:
            return sys.stdin.readline() or None
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return input(PROMPT)
        except KeyboardInterrupt:
            click.echo("")
            return ""
        except EOFError:
            click.echo("")
            return None
        finally:
            signal.signal(signal.SIGINT, before)

    async def _answer(self, text: str) -> None:
        """Ask, show, and remember both; what Ctrl-C cuts off is remembered as it is."""
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces, end = list[str](), dict[str, Any]()
        answering = asyncio.ensure_future(self._stream(messages, pieces, end))
        loop = asyncio.get_running_loop()
        if self._in_terminal:
            loop.add_signal_handler(signal.SIGINT, answering.cancel)
        try:
            await answering
        except asyncio.CancelledError:
            if not self._in_terminal or not answering.cancelled():
                raise
            end["finish_reason"] = "stopped"
        except ConfidantError as failure:
            if not self._in_terminal:
                raise
            click.echo("")
            if isinstance(failure, PromptTooLongError):
                failure.hint = "/clear begins anew"
            print_error(failure, as_json=False)
            return
        finally:
            if self._in_terminal:
                loop.remove_signal_handler(signal.SIGINT)
        answer = "".join(pieces)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        if self._as_json:
            print_json({"role": "assistant", "content": answer, **end})
            return
        click.echo("")
        if end.get("finish_reason") == "length":
            click.echo("(cut off: there is no room for more)", err=True)

    async def _stream(
        self, messages: list[Message], pieces: list[str], end: dict[str, Any]
    ) -> None:
        request = {
            **self._request, "messages": messages, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        async with aclosing(self._client.server_events("/v1/chat/completions", request)) as events:
            async for event in events:
                end |= {"usage": event["usage"]} if "usage" in event else {}
                for choice in event["choices"]:
                    if choice["finish_reason"]:
                        end["finish_reason"] = plain(choice["finish_reason"])
                    piece = str(choice["delta"].get("content") or "")
                    pieces.append(piece)
                    if not self._as_json:
                        click.echo(printable(piece), nl=False)
