"""`confidant serve`: a model for other programs, until Ctrl-C."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import click

from confidantd.cli.client import Client
from confidantd.cli.generating import PhaseLine
from confidantd.cli.output import plain, print_json
from confidantd.errors import (
    CancelledJobError,
    ConfidantError,
    DaemonNotRunningError,
    from_wire,
)

Events = AsyncGenerator[dict[str, Any], None]


async def run_serving(client: Client, request: Mapping[str, Any], *, as_json: bool) -> None:
    """Start it and say where it answers; stay until it ends, unless it shall go on by itself."""
    async with aclosing(client.stream("POST", "/v1/serve", request)) as events:
        try:
            event = await until_served(events, as_json=as_json)
        except asyncio.CancelledError:
            if request["stays"] and not as_json:
                click.echo("\nit goes on: `confidant jobs` lists it", err=True)
            raise
        if as_json:
            print_json(event)
        else:
            click.echo(f"{plain(event['model'])} answers at {plain(event['base_url'])}")
        if request["stays"]:
            if not as_json:
                click.echo(f"`confidant jobs cancel {plain(event['job'])}` ends it")
            return
        try:
            async for event in events:
                report(event, as_json=as_json)
        except asyncio.CancelledError:
            if not as_json:
                click.echo("", err=True)
            raise
    raise DaemonNotRunningError("the daemon ended", "start confidantd again")


async def until_served(events: Events, *, as_json: bool) -> dict[str, Any]:
    """The event that says where the model answers."""
    line = PhaseLine(quiet=as_json or not sys.stderr.isatty())
    async for event in events:
        line.clear()
        if event["event"] == "serving":
            return event
        if event["event"] == "progress":
            line.show(event)
        else:
            report(event, as_json=as_json)
    raise DaemonNotRunningError("the daemon ended before the model was served", "start it again")


def report(event: Mapping[str, Any], *, as_json: bool) -> None:
    """What happens while a model is served; raises why it is not any more."""
    match event["event"]:
        case "failed":
            failure: ConfidantError = from_wire(event)
            raise failure
        case "cancelled":
            raise CancelledJobError("the model is not served any more")
        case "replan" if not as_json:
            click.echo(plain(f"goes on over other devices: {event['reason']}"), err=True)
        case "notice" if not as_json:
            click.echo(plain(f"{event['name']}: {event['message']}"), err=True)
