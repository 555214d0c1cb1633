"""`confidant generate`: the text as it comes, or one JSON object at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import click

from confidantd.cli.client import Client
from confidantd.cli.output import plain, print_json
from confidantd.errors import (
    CancelledJobError,
    ConfidantError,
    DaemonNotRunningError,
    from_wire,
)

PHASES = {
    "import": "reading the model file (once per file)",
    "compile": "compiling programs (once per model)",
    "quantise": "quantising weights (once per model)",
    "distribute": "sending layers",
    "measure": "measuring backends",
}


async def run_generation(client: Client, request: Mapping[str, Any], *, as_json: bool) -> None:
    """Stream the text to the terminal; with JSON print the contract's object."""
    progress = PhaseLine(quiet=as_json or not sys.stderr.isatty())
    async with aclosing(client.stream("POST", "/v1/generate", request)) as events:
        async for event in events:
            progress.clear()
            match event["event"]:
                case "failed":
                    failure: ConfidantError = from_wire(event)
                    raise failure
                case "cancelled":
                    raise CancelledJobError("the generation was cancelled")
                case "progress":
                    progress.show(event)
                case "notice" if not as_json:
                    click.echo(plain(f"{event['name']}: {event['message']}"), err=True)
                case "token" if not as_json:
                    progress.quiet = True  # from here on the line is the text's
                    click.echo(printable(event["text"]), nl=False)
                case "done":
                    _end(event, as_json=as_json)
                    return
    raise DaemonNotRunningError("the daemon ended before the text did", "start confidantd again")


def _end(event: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({name: value for name, value in event.items() if name != "event"})
    else:
        click.echo("")


def printable(text: str) -> str:
    """Model output may hold anything; only text, line breaks and tabs reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class PhaseLine:
    """One line on standard error while the pipeline comes up."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._shown = False

    def show(self, event: Mapping[str, Any]) -> None:
        """Draw the phase over the last one."""
        if self.quiet:
            return
        name = PHASES.get(event["phase"]) or plain(event["phase"])[:20]
        sys.stderr.write(f"\r\x1b[K{name} {event['done']}/{event['of']}")
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
