"""`confidant plan`: the plan, and that it is being made where that takes a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from confidantd.cli import plan_table
from confidantd.cli.client import Client
from confidantd.cli.output import console, print_json

QUIET_SECONDS = 2.0  # most plans are there by then
REFRESH_SECONDS = 1.0
WORKING = "planning: comparing devices, their order and their layers"


async def run_plan(client: Client, request: Mapping[str, Any], *, as_json: bool) -> None:
    """Ask for a plan and print it; what is said meanwhile goes to standard error."""
    asked = asyncio.ensure_future(client.post("/v1/plan", request))
    try:
        done, _ = await asyncio.wait({asked}, timeout=QUIET_SECONDS)
        if not done and not as_json:
            await _say_until(asked, Console(stderr=True, highlight=False))
        fields = await asked
    finally:
        asked.cancel()
    if as_json:
        print_json(fields)
    else:
        console().print(plan_table.plan(fields))


async def _say_until(asked: asyncio.Future[dict[str, Any]], screen: Console) -> None:
    """Where it is no terminal, one line."""
    if not screen.is_terminal:
        screen.print(WORKING, soft_wrap=True)
        await asyncio.wait({asked})
        return
    began = time.monotonic() - QUIET_SECONDS
    with screen.status(WORKING) as status:
        while not asked.done():
            status.update(f"{WORKING} ({time.monotonic() - began:.0f} s)")
            await asyncio.wait({asked}, timeout=REFRESH_SECONDS)
