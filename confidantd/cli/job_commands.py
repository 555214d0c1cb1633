"""`confidant jobs`: list, show, watch, cancel, resume."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from confidantd.cli.run import common, json_wanted, run, show


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
@common
def show_job(job: str) -> None:
    """All that is known of a job."""
    show("GET", _path(job), "job")


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
    """End a job; its stages are freed and nothing is written."""
    _order(f"{_path(job)}/cancel", "cancelled {job}")


@jobs.command("resume")
@click.argument("job", metavar="ID")
@common
def resume(job: str) -> None:
    """Go on with a job that was interrupted (not there yet)."""
    _order(f"{_path(job)}/resume", "resumed {job}")


def _path(job: str) -> str:
    return f"/v1/jobs/{quote(job, safe='')}"


def _order(path: str, said: str) -> None:
    """A POST whose answer is worth one line."""

    async def work(client: Any) -> None:
        from confidantd.cli.output import plain, print_json

        fields = await client.post(path)
        if json_wanted():
            print_json(fields)
        else:
            click.echo(plain(said.format(**fields)))

    run(work)
