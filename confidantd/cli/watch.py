"""`confidant peers --watch`: the table, kept up to date."""

from __future__ import annotations

import asyncio

from rich.live import Live

from confidantd.cli import tables
from confidantd.cli.client import Client
from confidantd.cli.output import console, print_json

REFRESH_SECONDS = 1.0


async def watch_peers(client: Client, *, as_json: bool) -> None:
    """Until Ctrl-C; with `--json` one line a second."""
    if as_json:
        while True:
            print_json(await client.get("/v1/peers"))
            await asyncio.sleep(REFRESH_SECONDS)
    with Live(console=console(), auto_refresh=False) as live:
        while True:
            live.update(tables.peers(await client.get("/v1/peers")), refresh=True)
            await asyncio.sleep(REFRESH_SECONDS)
