"""`confidant jobs`: list, show, watch, cancel, resume."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from confidantd.cli.option_types import path
from confidantd.cli.run import common, json_wanted, run, show
from confidantd.errors import OutputError

if TYPE_CHECKING:
    from confidantd.cli.client import Client


@click.group(invoke_without_command=True)
@common
@click.pass_context
def jobs(context: click.Context) -> None:
    """Jobs of this device, the newest first."""
    if context.invoked_subcommand is None:
        show("GET", "/v1/jobs", "jobs")


@jobs.command("list")
@common
def list_jobs() -> None:
    """Jobs of this device, the newest first."""
    show("GET", "/v1/jobs", "jobs")


@jobs.command("show")
@click.argument("job", metavar="ID")
@click.option("--timeline", metavar="FILE", type=path, help="Draw a step of a training job as SVG.")
@common
def show_job(job: str, timeline: Path | None) -> None:
    """All that is known of a job."""
    if timeline is None:
        show("GET", _path(job), "job")
    else:
        run(lambda client: _draw(client, job, timeline))


async def _draw(client: Client, job: str, file: Path) -> None:
    """Write the picture, and say so."""
    from confidantd.cli.output import print_json
    from confidantd.cli.timeline import draw

    fields = await client.ask("GET", f"{_path(job)}/timeline")
    picture = draw(fields)
    try:
        await asyncio.to_thread(file.write_text, picture)
    except OSError as failure:
        raise OutputError(
            f"{file} cannot be written ({failure.strerror})", "choose another file"
        ) from None
    if json_wanted():
        print_json({"timeline": str(file)})
    else:
        click.echo(f"drawn in {file}")


@jobs.command("watch")
@click.argument("job", metavar="ID")
@common
def watch(job: str) -> None:
    """Follow a job to its end."""
    from confidantd.cli.training import watch_job

    as_json = json_wanted()
    run(lambda client: watch_job(client, job, as_json=as_json))


@jobs.command("cancel")
@click.argument("job", metavar="ID")
@common
def cancel(job: str) -> None:
    """End a job; nothing is written. One that failed cannot be resumed then."""
    _order(f"{_path(job)}/cancel", "cancelled {job}")


@jobs.command("resume")
@click.argument("job", metavar="ID")
@click.option("--output", metavar="DIR", type=path, help="Another folder for the result.")
@common
def resume(job: str, output: Path | None) -> None:
    """Go on with a job that failed, from its last checkpoint."""
    body = {} if output is None else {"output": str(output)}
    _order(f"{_path(job)}/resume", "resumed {job}", body)


def _path(job: str) -> str:
    return f"/v1/jobs/{quote(job, safe='')}"


def _order(path: str, said: str, body: dict[str, Any] | None = None) -> None:
    """A POST whose answer is worth one line."""

    async def work(client: Any) -> None:
        from confidantd.cli.output import plain, print_json

        fields = await client.post(path, body or {})
        if json_wanted():
            print_json(fields)
        else:
            click.echo(plain(said.format(**fields)))

    run(work)
