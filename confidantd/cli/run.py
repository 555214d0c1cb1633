"""How every command runs: which daemon it talks to, how it prints, what its exit status is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from confidantd.config import default_home
from confidantd.errors import ConfidantError

if TYPE_CHECKING:
    from confidantd.cli.client import Client

_Command = TypeVar("_Command", bound=Callable[..., Any])

INTERRUPTED = 128 + signal.SIGINT  # the exit status of a command ended by Ctrl-C
_HOME = "confidant.home"
_JSON = "confidant.json"


def common(command: _Command) -> _Command:
    """Give a command `--home` and `--json`; both may also stand before the command's name."""
    for declare in (
        click.option(
            "--home",
            metavar="DIR",
            type=click.Path(path_type=Path),
            expose_value=False,
            callback=_keep(_HOME),
            help="Home of the daemon to talk to.",
        ),
        click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=_keep(_JSON),
            help="Print JSON, for programs.",
        ),
    ):
        command = declare(command)
    return command


def _keep(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that notes an option that was given; the innermost one wins."""

    def keep(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value:
            context.meta[key] = value

    return keep


def chosen_home() -> Path:
    """The home that the command line names, else the default one."""
    named = click.get_current_context().meta.get(_HOME)
    return (named or default_home(os.environ)).absolute()


def json_wanted() -> bool:
    """Whether `--json` was given."""
    return bool(click.get_current_context().meta.get(_JSON, False))


def run(work: Callable[[Client], Awaitable[None]]) -> None:
    """Run a command's coroutine with a client; an error becomes one line and status 1."""
    from confidantd.cli.client import Client

    home = chosen_home()

    async def connected() -> None:
        async with Client(home) as client:
            await work(client)

    try:
        asyncio.run(connected())
    except ConfidantError as failure:
        fail(failure)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        fail(
            ConfidantError(
                "the daemon's answer is not understood",
                "if another version of confidantd is running, restart it",
            )
        )
    except KeyboardInterrupt:
        click.get_current_context().exit(INTERRUPTED)


def fail(failure: ConfidantError) -> None:
    """Print an error as the contract says and end with status 1."""
    from confidantd.cli.output import print_error

    print_error(failure, as_json=json_wanted())
    click.get_current_context().exit(1)


def show(
    method: str,
    path: str,
    view: str,
    body: Mapping[str, Any] | None = None,
    *,
    meanwhile: str = "",
) -> None:
    """Ask once; print the JSON, or the table that `tables.<view>` makes of it. `meanwhile`: what
    a terminal shows until the answer is there.
    """

    async def work(client: Client) -> None:
        if json_wanted():
            from confidantd.cli.output import print_json

            print_json(await client.ask(method, path, body))
            return
        from confidantd.cli import tables
        from confidantd.cli.output import console

        with console().status(meanwhile) if meanwhile else contextlib.nullcontext():
            fields = await client.ask(method, path, body)
        console().print(getattr(tables, view)(fields))

    run(work)
