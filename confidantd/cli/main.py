"""`confidant`: a thin client of the local daemon.

Modules are loaded inside the command that needs them, so that `--help` and a mistyped option
answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

import confidantd
from confidantd.cli.job_commands import jobs
from confidantd.cli.member_commands import invite, join, leave, members, remove
from confidantd.cli.model_commands import chat, generate, plan, serve, train
from confidantd.cli.run import common, json_wanted, run, show


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(confidantd.__version__, message="confidant %(version)s")
@common
def confidant() -> None:
    """Fine-tune and run a language model together with the devices on this network."""


@confidant.command()
@common
def status() -> None:
    """This device, its swarm, its coordinator, its jobs."""
    show("GET", "/v1/status", "status")


@confidant.command()
@click.option("--watch", is_flag=True, help="Keep the table up to date until Ctrl-C.")
@common
def peers(watch: bool) -> None:
    """Devices on the network: paired ones, and others that announce themselves."""
    if not watch:
        show("GET", "/v1/peers", "peers")
        return
    from confidantd.cli.watch import watch_peers

    as_json = json_wanted()
    run(lambda client: watch_peers(client, as_json=as_json))


@confidant.command()
@common
def doctor() -> None:
    """What is there, what is missing, and what to do about it."""
    show("GET", "/v1/doctor", "doctor", meanwhile="asking the other devices")


@confidant.command()
@click.option(
    "--folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where it works; new or empty. [default: a new temporary folder]",
)
@common
@click.pass_context
def demo(context: click.Context, folder: Path | None) -> None:
    """Three daemons on this machine meet, fine-tune a small model and generate with it."""
    from confidantd.cli.demo import run_demo

    context.exit(run_demo(folder, as_json=json_wanted()))


for command in (members, remove, invite, join, leave, plan, train, generate, serve, chat, jobs):
    confidant.add_command(command)


def main() -> None:
    """Entry point of the `confidant` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    confidant(prog_name="confidant")


if __name__ == "__main__":
    main()
