"""`confidant train` and `confidant jobs watch`: live progress until the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from confidantd.cli import tables
from confidantd.cli.client import Client
from confidantd.cli.output import cell, console, duration, plain, print_json, size
from confidantd.errors import ConfidantError, from_wire

PHASES = {
    "prepare": "reading the text",
    "compile": "compiling programs",
    "distribute": "sending layers",
    "load": "loading layers",
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
        print_json({"job": job}) if as_json else typer.echo(job)
        return
    try:
        await watch_job(client, job, as_json=as_json)
    except asyncio.CancelledError:
        if not as_json:
            typer.echo(
                f"\njob {job} goes on: `confidant jobs watch {job}` follows it, "
                f"`confidant jobs cancel {job}` ends it",
                err=True,
            )
        raise


async def watch_job(client: Client, job: str, *, as_json: bool) -> None:
    """Every event of a job from the first to the last; raises its failure."""
    await client.get(f"/v1/jobs/{job}")  # an unknown job is said before anything is drawn
    events = client.stream("GET", f"/v1/jobs/{job}/events")
    if as_json:
        failed = False
        async for event in events:
            print_json(event)
            failed = event["event"] == "failed"
        if failed:
            raise typer.Exit(1)
        return
    screen = console()
    if screen.is_terminal:
        await _draw(events, screen)
    else:
        await _print(events, screen)


async def _draw(events: AsyncIterator[dict[str, Any]], screen: Console) -> None:
    """One live line at the bottom, tables above it."""
    with Live(console=screen, auto_refresh=False, transient=True) as live:
        async for event in events:
            _raise_failure(event)
            match event["event"]:
                case "progress":
                    live.update(_phase(event), refresh=True)
                case "step":
                    live.update(_step(event, screen.width), refresh=True)
                case _:
                    shown = _block(event)
                    if shown is not None:
                        live.console.print(shown)


async def _print(events: AsyncIterator[dict[str, Any]], screen: Console) -> None:
    """Plain lines, for logs."""
    phase = ""
    async for event in events:
        _raise_failure(event)
        match event["event"]:
            case "progress":
                if event["phase"] != phase:
                    phase = event["phase"]
                    screen.print(Text(PHASES.get(phase, phase)))
            case "step":
                every = max(1, event["steps"] // PLAIN_STEP_LINES)
                if event["step"] % every == 0 or event["step"] in (1, event["steps"]):
                    screen.print(Text(_step_line(event)))
            case _:
                shown = _block(event)
                if shown is not None:
                    screen.print(shown)


def _raise_failure(event: Mapping[str, Any]) -> None:
    if event["event"] == "failed":
        failure: ConfidantError = from_wire(event)
        raise failure


def _phase(event: Mapping[str, Any]) -> Text:
    name = PHASES.get(event["phase"], plain(event["phase"]))
    of = max(1, event["of"])
    full = round(BAR_CELLS * min(1.0, event["done"] / of))
    line = Text(f"{name:<20}")
    line.append("█" * full, style="cyan").append("·" * (BAR_CELLS - full), style="dim")
    if event["detail"] == "bytes":
        line.append(f" {size(event['done'])} of {size(of)}")
    else:
        line.append(f" {event['done']}/{of} {plain(event['detail'])}")
    return line


def _step_line(event: Mapping[str, Any]) -> str:
    busy = " ".join(f"{100 * s['busy_fraction']:.0f}%" for s in event["stages"])
    return (
        f"step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  "
        f"lr {event['learning_rate']:.2e}  {event['tokens_per_second']:.0f} tok/s  "
        f"busy {busy}"
    )


def _step(event: Mapping[str, Any], width: int) -> Text:
    full = round(BAR_CELLS * event["step"] / event["steps"])
    line = Text("█" * full, style="green").append("·" * (BAR_CELLS - full), style="dim")
    line.append(f" {duration(event['seconds_left'])} left\n", style="bold")
    line.append(_step_line(event)[: width - 1], style="")
    return line


def _block(event: Mapping[str, Any]) -> Any:
    """What stays on the screen."""
    match event["event"]:
        case "plan":
            return tables.plan(event)
        case "eval":
            return Text(f"held-out loss after {event['step']} steps: {event['loss']:.4f}")
        case "replan":
            return Text(f"new plan (epoch {event['epoch']}): {plain(event['reason'])}")
        case "done":
            return _done(event)
        case _:
            return None


def _done(event: Mapping[str, Any]) -> Any:
    made = tables.table("device", "layers", "peak memory", "busy", right=("peak memory", "busy"))
    for stage in event["stages"]:
        made.add_row(
            cell(stage.get("name", stage["device"][:8])),
            cell(f"{stage['layers'][0]}-{stage['layers'][1] - 1}"),
            cell(size(stage["peak_memory_bytes"])),
            cell(f"{100 * stage['busy_fraction']:.0f}%"),
        )
    made.caption = Text(
        f"{event['steps']} steps, last loss {event['final_loss']:.4f}, in {plain(event['output'])}"
    )
    made.caption_justify = "left"
    return made
