"""`confidant members | remove`, and pairing by code, which is not there yet."""

from __future__ import annotations

from pathlib import Path

import click

from confidantd.cli.run import common, fail, json_wanted, run, show
from confidantd.errors import ConfidantError


@click.group(invoke_without_command=True)
@common
@click.pass_context
def members(context: click.Context) -> None:
    """Paired devices: list them, add a certificate, export this one's."""
    if context.invoked_subcommand is None:
        show("GET", "/v1/members", "members")


@members.command("list")
@common
def list_members() -> None:
    """Paired devices."""
    show("GET", "/v1/members", "members")


@members.command("add")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@common
def add(files: tuple[Path, ...]) -> None:
    """Trust the devices whose certificates are in FILE..."""
    from confidantd.cli.pairing import add_members

    as_json = json_wanted()
    run(lambda client: add_members(client, files, as_json=as_json))


@members.command("export")
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@common
def export(file: Path | None) -> None:
    """Write this device's certificate to FILE, or print it: the others add it."""
    from confidantd.cli.pairing import export_certificate

    as_json = json_wanted()
    run(lambda client: export_certificate(client, file, as_json=as_json))


@click.command()
@click.argument("device", metavar="DEVICE")
@common
def remove(device: str) -> None:
    """Trust DEVICE (its name, short id or id) no longer, on this device."""
    from confidantd.cli.pairing import remove_member

    as_json = json_wanted()
    run(lambda client: remove_member(client, device, as_json=as_json))


@click.command()
@common
def invite() -> None:
    """Pair by a short code (not there yet)."""
    _not_yet()


@click.command()
@click.argument("code", metavar="CODE", expose_value=False)
@common
def join() -> None:
    """Pair by a short code (not there yet)."""
    _not_yet()


@click.command()
@common
def leave() -> None:
    """Leave the swarm (not there yet)."""
    _not_yet()


def _not_yet() -> None:
    fail(
        ConfidantError(
            "pairing by code is not there yet, devices pair by certificate files",
            "give `confidant members export FILE` on each device, copy the files, "
            "and `confidant members add FILE` on the others",
        )
    )
