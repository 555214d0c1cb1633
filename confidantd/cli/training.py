"""`confidant train` and `confidant jobs watch`: live progress until the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from confidantd.cli import plan_table, tables
from confidantd.cli.client import Client
from confidantd.cli.output import cell, console, duration, plain, print_json, size
from confidantd.errors import (
    CancelledJobError,
    ConfidantError,
    DaemonNotRunningError,
    from_wire,
)

Event = dict[str, Any]
Events = AsyncGenerator[Event, None]

PHASES = {
    "import": "reading the model file (once per file)",
    "prepare": "reading the text",
    "recover": "going on after a loss",
    "compile": "compiling programs",
    "distribute": "sending layers",
    "load": "loading layers",
    "measure": "measuring backends",
    "save": "saving the result",
}
BAR_CELLS = 24
PLAIN_STEP_LINES = 50  # where output is no terminal, about this many step lines a job


async def run_training(
    client: Client, request: Mapping[str, Any], *, detach: bool, as_json: bool
) -> None:
    """Start a job; follow it unless it is detached."""
    job = (await client.post("/v1/train", request))["job"]
    if detach:
        print_json({"job": job}) if as_json else click.echo(job)
        return
    try:
        await watch_job(client, job, as_json=as_json)
    except asyncio.CancelledError:
        if not as_json:
            click.echo(
                f"\njob {job} goes on: `confidant jobs watch {job}` follows it, "
                f"`confidant jobs cancel {job}` ends it",
                err=True,
            )
        raise


async def watch_job(client: Client, job: str, *, as_json: bool) -> None:
    """Every event of a job from the first to the last; raises what ended it early."""
    path = f"/v1/jobs/{quote(job, safe='')}"
    await client.get(path)  # an unknown job is said before anything is drawn
    screen = console()
    over = DaemonNotRunningError(
        f"the daemon ended before the job {job} did",
        f"start confidantd again: training goes on, `confidant jobs watch {job}` follows it",
    )
    try:
        async with aclosing(client.stream("GET", f"{path}/events")) as events:
            if as_json:
                last = await _print_json(events)
            elif screen.is_terminal:
                last = await _draw(events, screen)
            else:
                last = await _print(events, screen)
    except DaemonNotRunningError:
        raise over from None
    match last.get("event"):
        case "done":
            return
        case "failed" if as_json:
            raise click.exceptions.Exit(1)  # the event has said why
        case "failed":
            failure: ConfidantError = from_wire(last)
            raise failure
        case "cancelled":
            raise CancelledJobError(f"job {job} was cancelled")
        case _:
            raise over


async def _print_json(events: Events) -> Event:
    """One line an event; gives the last one."""
    last: Event = {}
    async for last in events:
        print_json(last)
    return last


async def _draw(events: Events, screen: Console) -> Event:
    """Live lines at the bottom, tables above them; gives the last event."""
    last: Event = {}
    with Live(console=screen, auto_refresh=False, transient=True) as live:
        async for last in events:
            match last["event"]:
                case "progress":
                    live.update(_phase(last), refresh=True)
                case "step":
                    live.update(_step(last), refresh=True)
                case _:
                    _show_block(last, live.console)
    return last


async def _print(events: Events, screen: Console) -> Event:
    """Plain lines, for logs; gives the last event."""
    phase = ""
    last: Event = {}
    async for last in events:
        match last["event"]:
            case "progress":
                shown = _phase_name(last["phase"])
                if last["phase"] == "recover":
                    shown += f": {plain(last['detail'])}"
                if shown != phase:
                    phase = shown
                    screen.print(Text(phase), soft_wrap=True)
            case "step":
                every = max(1, last["steps"] // PLAIN_STEP_LINES)
                if last["step"] % every == 0 or last["step"] in (1, last["steps"]):
                    screen.print(Text(_step_line(last)), soft_wrap=True)
            case _:
                _show_block(last, screen)
    return last


def _phase_name(phase: str) -> str:
    return PHASES.get(phase) or plain(phase)[:20]


def _phase(event: Event) -> Text:
    of = max(1, event["of"])
    full = round(BAR_CELLS * min(1.0, event["done"] / of))
    line = Text(f"{_phase_name(event['phase']):<20}", no_wrap=True, overflow="ellipsis")
    line.append("█" * full, style="cyan").append("·" * (BAR_CELLS - full), style="dim")
    if event["detail"] == "bytes":
        line.append(f" {size(event['done'])} of {size(of)}")
    else:
        line.append(f" {event['done']}/{of} {plain(event['detail'])}")
    return line


def _step_line(event: Event) -> str:
    busy = " ".join(f"{100 * s['busy_fraction']:.0f}%" for s in event["stages"])
    kept = event.get("checkpoint")
    return (
        f"step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  "
        f"lr {event['learning_rate']:.2e}  {event['tokens_per_second']:.0f} tok/s  "
        f"busy {busy}" + (f"  kept {kept['step']}" if kept else "")
    )


def _step(event: Event) -> Group:
    full = round(BAR_CELLS * event["step"] / event["steps"])
    bar = Text("█" * full, style="green").append("·" * (BAR_CELLS - full), style="dim")
    bar.append(f" {duration(event['seconds_left'])} left", style="bold")
    return Group(bar, Text(_step_line(event), no_wrap=True, overflow="ellipsis"))


def _show_block(event: Event, screen: Console) -> None:
    """Print what stays on the screen; a path is not cut, so that it can be copied."""
    shown = _block(event)
    if shown is not None:
        screen.print(shown, soft_wrap=isinstance(shown, Text))
    if event["event"] == "done":
        loss, steps = event["final_loss"], event["steps"]
        screen.print(Text(f"{steps} steps, last loss {loss:.4f}", style="bold"))
        screen.print(Text(f"saved in {plain(event['output'])}"), soft_wrap=True)


def _block(event: Event) -> RenderableType | None:
    """What stays on the screen."""
    match event["event"]:
        case "plan":
            return plan_table.plan(event)
        case "eval":
            return Text(f"held-out loss after {event['step']} steps: {event['loss']:.4f}")
        case "notice":
            name, message = plain(event["name"]), plain(event["message"])
            return Text(f"{name}: {message}", style="yellow")
        case "backends" | "replan":
            return Text(_changed(event))
        case "done":
            return _done(event)
        case _:
            return None


def _done(event: Event) -> Table:
    made = tables.table("device", "layers", "peak memory", "busy", right=("peak memory", "busy"))
    for stage in event["stages"]:
        made.add_row(
            cell(stage.get("name", stage["device"][:8])),
            cell(f"{stage['layers'][0]}-{stage['layers'][1] - 1}"),
            cell(size(stage["peak_memory_bytes"])),
            cell(_busy(stage)),
        )
    return made


def _changed(event: Event) -> str:
    """Who computes from now on."""
    if event["event"] == "replan":
        return f"new plan (epoch {event['epoch']}): {plain(event['reason'])}"
    return f"{plain(event['name'])}: {tables.backend_shares(event['backends'])}"


def _busy(stage: Mapping[str, Any]) -> str:
    """The stage's busy share, and that of each backend where there are several."""
    each = [
        f"{plain(b['name'])} {100 * b['busy_fraction']:.0f}%"
        for b in stage.get("backends", ())
        if "busy_fraction" in b
    ]
    return ", ".join([f"{100 * stage['busy_fraction']:.0f}%", *each])
