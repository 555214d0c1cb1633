"""`confidant generate`: the text as it comes, or one JSON object at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import typer

from confidantd.cli.client import Client
from confidantd.cli.output import print_json
from confidantd.errors import ConfidantError, from_wire

PHASES = {"compile": "compiling programs (once per model)", "distribute": "sending layers"}


async def run_generation(client: Client, request: Mapping[str, Any], *, as_json: bool) -> None:
    """Stream the text to the terminal; with JSON print the contract's object."""
    progress = _Progress(quiet=as_json or not sys.stderr.isatty())
    async for event in client.stream("POST", "/v1/generate", request):
        match event["event"]:
            case "failed":
                progress.clear()
                failure: ConfidantError = from_wire(event)
                raise failure
            case "progress":
                progress.show(event)
            case "token":
                progress.clear()
                if not as_json:
                    typer.echo(_printable(event["text"]), nl=False)
                    sys.stdout.flush()
            case "done":
                if as_json:
                    print_json({k: v for k, v in event.items() if k != "event"})
                else:
                    typer.echo("")


def _printable(text: str) -> str:
    """Model output may hold anything; only text, line breaks and tabs reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class _Progress:
    """One line on standard error while the pipeline comes up."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._shown = False

    def show(self, event: Mapping[str, Any]) -> None:
        """Draw the phase over the last one."""
        if self._quiet:
            return
        name = PHASES.get(event["phase"], event["phase"])
        sys.stderr.write(f"\r\x1b[K{name} {event['done']}/{event['of']}")
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
