"""`confidant invite | join | members | remove | leave`."""

from __future__ import annotations

from pathlib import Path

import click

from confidantd.cli.run import common, json_wanted, run, show


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
    """Take DEVICE (its name, short id or id) out of the swarm."""
    from confidantd.cli.pairing import remove_member

    as_json = json_wanted()
    run(lambda client: remove_member(client, device, as_json=as_json))


@click.command()
@common
def invite() -> None:
    """Show a code with which one more device joins the swarm."""
    from confidantd.cli.inviting import show_invitation

    as_json = json_wanted()
    run(lambda client: show_invitation(client, as_json=as_json))


@click.command()
@click.argument("code", metavar="CODE")
@click.option("--at", metavar="HOST:PORT", default="", help="Where the inviter is, without mDNS.")
@click.option("--merge", is_flag=True, help="With all members of this device's own swarm.")
@common
def join(code: str, at: str, merge: bool) -> None:
    """Join the swarm of the device that shows CODE (confidant invite)."""
    from confidantd.cli.inviting import join_swarm

    as_json = json_wanted()
    run(lambda client: join_swarm(client, code, at, merge=merge, as_json=as_json))


@click.command()
@common
def leave() -> None:
    """Leave the swarm: the others forget this device, and it forgets them."""
    from confidantd.cli.inviting import leave_swarm

    as_json = json_wanted()
    run(lambda client: leave_swarm(client, as_json=as_json))
