"""Pairing by a code: what the inviter and the joiner see."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import click
import segno
from rich.live import Live
from rich.text import Text

from confidantd.cli.client import Client
from confidantd.cli.output import console, duration, plain, print_json
from confidantd.errors import ConfidantError, NotPairedError

POLL_SECONDS = 0.3
SOON_SECONDS = 1.5  # after which a wait is explained
_ENDS = {
    "expired": ("the code has expired", "confidant invite shows a new one"),
    "refused": (
        "the code was guessed wrong too often and is closed",
        "somebody may be trying to get in; confidant invite shows a new one",
    ),
    "withdrawn": ("the invitation was withdrawn", "confidant invite shows a new one"),
}


async def show_invitation(client: Client, *, as_json: bool) -> None:
    """Print the code and wait until it is used; Ctrl-C withdraws it. JSON: only print it."""
    shown = await client.post("/v1/invite")
    if as_json:
        print_json(shown)
        return
    _print_invitation(shown)
    state: dict[str, Any] = {}
    try:
        state = await _until_used(client, shown["code"].partition("-")[0])
    except asyncio.CancelledError:
        with contextlib.suppress(ConfidantError):
            await client.delete("/v1/invite")
        raise
    if state["outcome"] != "joined":
        raise NotPairedError(*_ENDS[state["outcome"]])
    _say_paired(state["device"], shown)


async def join_swarm(client: Client, code: str, at: str, *, merge: bool, as_json: bool) -> None:
    """Prove the code to the device that shows it."""
    asked = {"code": code, "at": at, "merge": merge}
    if as_json:
        print_json(await client.post("/v1/join", asked))
        return
    with console().status("looking for the device that shows this code"):
        joined = await client.post("/v1/join", asked)
    _say_paired(joined, joined["self"])


async def leave_swarm(client: Client, *, as_json: bool) -> None:
    """Be on one's own again."""
    leaving = asyncio.ensure_future(client.post("/v1/leave"))
    await asyncio.wait([leaving], timeout=SOON_SECONDS)
    if not leaving.done() and not as_json:
        click.echo("jobs of other devices move what they have here elsewhere ...", err=True)
    fields = await leaving
    if as_json:
        print_json(fields)
    else:
        count = fields["left_members"]
        click.echo(f"left the swarm of {count} other device{'' if count == 1 else 's'}")


def _print_invitation(shown: dict[str, Any]) -> None:
    code, address = plain(shown["code"]), plain(shown["address"])
    out = console()
    if out.is_terminal:
        segno.make(f"confidant join {code} --at {address}").terminal(compact=True)
    out.print(Text(f"\n    {'  '.join(' '.join(part) for part in code.split('-'))}\n", "bold"))
    click.echo(f"On the other device:  confidant join {code}")
    click.echo(f"If it finds nothing:  confidant join {code} --at {address}")


async def _until_used(client: Client, number: str) -> dict[str, Any]:
    with Live(console=console(), auto_refresh=False, transient=True) as live:
        while (state := await client.get("/v1/invite"))["outcome"] == "waiting":
            if state["number"] != number:  # another terminal invites: this code is of no use
                return {**state, "outcome": "withdrawn"}
            wrong = f", {state['wrong']} wrong so far" if state["wrong"] else ""
            left = duration(state["seconds_left"])
            live.update(Text(f"waiting for a device, {left} left{wrong}"), refresh=True)
            await asyncio.sleep(POLL_SECONDS)
    return state if state["number"] == number else {**state, "outcome": "withdrawn"}


def _say_paired(other: dict[str, Any], me: dict[str, Any]) -> None:
    """Both sides see the other's name and short id, to compare with that screen."""
    name, short = plain(other["name"]) or "a device", plain(other["short_id"])
    click.echo(f"paired with {name} ({short}); this device is {plain(me['short_id'])} there")
