"""Tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from confidantd.cli.output import cell, plain, size

STATE_STYLES = {
    "alive": "green", "suspect": "yellow", "gone": "red", "unpaired": "dim",
    "ok": "green", "warn": "yellow", "fail": "red", "none": "dim",
    "done": "green", "running": "cyan", "planning": "cyan", "recovering": "yellow",
    "failed": "red", "cancelled": "dim",
}  # fmt: skip
RUNNING = ("planning", "running", "recovering")
FLEXIBLE = ("name", "device", "model", "devices")
LEAST_CELLS = 8
MOST_NAMED = 2  # devices in a cell


def table(*columns: str, right: Iterable[str] = (), wide: str = "") -> Table:
    """An empty table; where space is short the columns named in `FLEXIBLE` and `wide` give way."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column not in (*FLEXIBLE, wide),
            overflow="fold" if column == wide else "ellipsis",
            min_width=LEAST_CELLS if column in FLEXIBLE else None,
        )
    return made


def status(fields: Mapping[str, Any]) -> RenderableType:
    """`confidant status`."""
    device, memory = fields["device"], fields["memory"]
    coordinator = fields["coordinator"]
    grid = Table.grid(padding=(0, 2))
    rows = [
        ("device", f"{device['name']}  {device['short_id']}"),
        ("version", fields["version"]),
        ("address", fields["address"]),
        ("swarm", f"{fields['swarm']['tag']}, {fields['swarm']['members']} members"),
        (
            "coordinator",
            f"{coordinator['name']} (term {coordinator['term']})" if coordinator else "none yet",
        ),
        (
            "memory",
            (
                f"{size(memory['available_bytes'])} free for jobs of "
                f"{size(memory['total_bytes'])}, {size(memory['granted_bytes'])} granted"
            ),
        ),
    ]
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), cell(value))
    parts: list[RenderableType] = [grid]
    if fields.get("conflict"):
        parts.append(Text(plain(fields["conflict"]), style="red"))
    running = [job for job in fields["jobs"] if job["state"] in RUNNING]
    if running:
        parts += [Text(""), jobs({"jobs": running})]
    return Group(*parts)


def peers(fields: Mapping[str, Any]) -> RenderableType:
    """`confidant peers`."""
    made = table(
        "name", "state", "address", "rtt", "Mbit/s", "memory", "can",
        right=("rtt", "Mbit/s", "memory"),
    )  # fmt: skip
    made.padding = (0, 0)  # one space between columns, so that names and addresses both fit
    for peer in fields["peers"]:
        trip, mbps = peer["round_trip_ms"], peer.get("bandwidth_mbps")
        made.add_row(
            cell(peer["name"] + (" (this)" if peer.get("self") else ""), cut=True),
            cell(peer["state"], STATE_STYLES.get(peer["state"], "")),
            cell(peer["address"]),
            cell("-" if trip is None else f"{trip:.3g} ms"),
            cell("-" if mbps is None else f"{mbps:.3g}" if mbps < 1000 else f"{mbps:.0f}"),
            cell(size(peer.get("available_bytes"))),
            cell(" ".join([*peer["backends"], *peer["roles"]])),
        )
    said: list[RenderableType] = [
        Text(f"{plain(peer['name'])} takes no work: {plain(peer['refuses'])}", style="yellow")
        for peer in fields["peers"]
        if peer.get("refuses")
    ]
    if fields.get("conflict"):
        said.append(Text(plain(fields["conflict"]), style="red"))
    return Group(made, *said) if said else made


def members(fields: Mapping[str, Any]) -> RenderableType:
    """`confidant members`."""
    made = table("name", "short id", "vouched for by", "id")
    for member in fields["members"]:
        by = ", ".join(m["name"] or m["short_id"] for m in member["let_in_by"][:MOST_NAMED])
        by += f" and {more} more" if (more := len(member["let_in_by"]) - MOST_NAMED) > 0 else ""
        name = member["name"] + (" (this)" if member["self"] else "")
        made.add_row(
            cell(name, cut=True),
            cell(member["short_id"]),
            cell(by, cut=True),
            cell(member["id"][:16] + "…"),
        )
    return made


def doctor(fields: Mapping[str, Any]) -> RenderableType:
    """`confidant doctor`."""
    made = table("check", "state", "what", wide="what")
    for check in fields["checks"]:
        absent = check["state"] == "none"
        text = Text(plain(check["message"]), style="dim" if absent else "")
        if check["hint"]:
            text.append(f"\n→ {plain(check['hint'])}", style="dim")
        made.add_row(
            cell(check["name"]), cell(check["state"], STATE_STYLES.get(check["state"], "")), text
        )
    return made


def jobs(fields: Mapping[str, Any]) -> RenderableType:
    """`confidant jobs`."""
    made = table("id", "kind", "model", "state", "step", "devices", right=("step",))
    for job in fields["jobs"]:
        steps = f"{job['step']}/{job['steps']}" if job["steps"] else "-"
        made.add_row(
            cell(job["id"]),
            cell(job["kind"]),
            cell(job.get("name") or job["model"].rstrip("/").rpartition("/")[2], cut=True),
            cell(job["state"], STATE_STYLES.get(job["state"], "")),
            cell(steps),
            cell(", ".join(job["devices"]), cut=True),
        )
    return made if fields["jobs"] else Text("no jobs yet", style="dim")


def job(fields: Mapping[str, Any]) -> RenderableType:
    """`confidant jobs show`."""
    grid = Table.grid(padding=(0, 2))
    for name in (
        "id", "kind", "name", "model", "state", "step", "steps", "epoch", "owner", "devices",
        "output", "message",
    ):  # fmt: skip
        value = fields.get(name)
        text = ", ".join(value) if isinstance(value, list) else value
        if text not in (None, ""):
            grid.add_row(Text(name, style="bold"), cell(text))
    return grid


def backend_shares(found: Iterable[Mapping[str, Any]]) -> str:
    """Who computes the blocks of a stage, in words."""
    return ", ".join(
        f"{plain(b['name'])} {b['heads']} heads and {b['columns']} columns" for b in found
    )
