"""Pairing by certificate files: export this device's, add the others'; and removing one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import click

from confidantd.cli.client import Client
from confidantd.cli.output import plain, print_json
from confidantd.errors import DeviceError, OutputError

MAX_FILE_BYTES = 65_536


async def add_members(client: Client, files: Sequence[Path], *, as_json: bool) -> None:
    """Trust the certificate in each file."""
    added = []
    for path in files:
        pem = await asyncio.to_thread(_read_certificate, path)
        added.append(await client.post("/v1/members", {"pem": pem}))
        if not as_json:
            click.echo(f"paired with {plain(added[-1]['short_id'])}: compare it on that device")
    if as_json:
        print_json({"members": added})


async def export_certificate(client: Client, file: Path | None, *, as_json: bool) -> None:
    """Write or print this device's certificate."""
    fields = await client.get("/v1/certificate")
    if as_json:
        print_json(fields)
    elif file is None:
        click.echo(fields["pem"], nl=False)
    else:
        await asyncio.to_thread(_write_certificate, file, fields["pem"])
        click.echo(f"{file}: certificate of {plain(fields['name'])}, {plain(fields['short_id'])}")


async def remove_member(client: Client, device: str, *, as_json: bool) -> None:
    """Take a device out of the swarm."""
    fields = await client.delete(f"/v1/members/{quote(device, safe='')}")
    if as_json:
        print_json(fields)
    else:
        click.echo(f"removed {plain(fields['short_id'])}; members that are off learn it later")
        for other in fields["let_in"]:
            name = plain(other["name"]) or plain(other["short_id"])
            click.echo(
                f"it had let in {name}, whom nobody else vouches for: confidant remove {name}"
            )


def _read_certificate(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "not a certificate"
        raise DeviceError(
            f"{path} cannot be read ({reason})",
            "export it again on its device with `confidant members export`",
        ) from None


def _write_certificate(path: Path, pem: str) -> None:
    try:
        path.write_text(pem, encoding="ascii")
    except OSError as failure:
        raise OutputError(
            f"{path} cannot be written ({failure.strerror})", "name another file"
        ) from None
