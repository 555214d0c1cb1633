"""`confidant`: one command a line of the contract, each a thin call of the daemon's API."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import confidantd
from confidantd.config import default_home
from confidantd.errors import ConfidantError

Home = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="Home of the daemon to talk to.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder in Hugging Face form.")]
Devices = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="Use exactly these devices.")
]
Method = Annotated[str, typer.Option(help="full or lora")]
Targets = Annotated[
    str | None, typer.Option(metavar="a,b,...", help="Modules that get a LoRA adapter.")
]

app = typer.Typer(
    name="confidant",
    help="Fine-tune and run a language model together with the devices on this network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
members_app = typer.Typer(
    help="Paired devices: list them, add a certificate, export this one's.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
jobs_app = typer.Typer(help="Jobs of this device.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(members_app, name="members")
app.add_typer(jobs_app, name="jobs")

PAIRING_HINT = (
    "for now: `confidant members export FILE` on each device, copy the files, "
    "`confidant members add FILE` on the others"
)


def _home(home: Path | None) -> Path:
    return (home or default_home(os.environ)).absolute()


def _run(work: Callable[[Any], Awaitable[None]], home: Path | None, as_json: bool) -> None:
    """Connect, run a command's coroutine, and turn its error into a line and a status."""
    from confidantd.cli.client import Client
    from confidantd.cli.output import print_error

    async def connected() -> None:
        async with Client(_home(home)) as client:
            await work(client)

    try:
        asyncio.run(connected())
    except ConfidantError as failure:
        print_error(failure, as_json=as_json)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None


def _show(path: str, view: str, home: Path | None, as_json: bool) -> None:
    """A GET whose answer has a table of its own."""

    async def work(client: Any) -> None:
        from confidantd.cli import tables
        from confidantd.cli.output import console, print_json

        fields = await client.get(path)
        if as_json:
            print_json(fields)
        else:
            console().print(getattr(tables, view)(fields))

    _run(work, home, as_json)


def _post(path: str, said: str, home: Path | None, as_json: bool, body: Any = None) -> None:
    """A POST whose answer is worth one line."""

    async def work(client: Any) -> None:
        from confidantd.cli.output import plain, print_json

        fields = await client.post(path, body)
        if as_json:
            print_json(fields)
        else:
            typer.echo(plain(said.format(**fields)))

    _run(work, home, as_json)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given: the daemon knows the defaults."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def status(home: Home = None, json: Json = False) -> None:
    """This device, its swarm, its coordinator, its jobs."""
    _show("/v1/status", "status", home, json)


@app.command()
def peers(
    watch: Annotated[bool, typer.Option("--watch", help="Keep the table up to date.")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Devices on the network: paired ones, and others that announce themselves."""
    if not watch:
        _show("/v1/peers", "peers", home, json)
        return
    from confidantd.cli.watch import watch_peers

    _run(lambda client: watch_peers(client, as_json=json), home, json)


@app.command()
def doctor(home: Home = None, json: Json = False) -> None:
    """What is there, what is missing, and what to do about it."""
    _show("/v1/doctor", "doctor", home, json)


@members_app.callback()
def members(context: typer.Context, home: Home = None, json: Json = False) -> None:
    """Paired devices."""
    if context.invoked_subcommand is None:
        _show("/v1/members", "members", home, json)


@members_app.command("list")
def members_list(home: Home = None, json: Json = False) -> None:
    """Paired devices."""
    _show("/v1/members", "members", home, json)


@members_app.command("add")
def members_add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Exported certificates.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """Trust the devices whose certificates are in FILE."""
    from confidantd.cli.pairing import add_members

    _run(lambda client: add_members(client, files, as_json=json), home, json)


@members_app.command("export")
def members_export(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]")] = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Write this device's certificate to FILE (or print it): the others add it."""
    from confidantd.cli.pairing import export_certificate

    _run(lambda client: export_certificate(client, file, as_json=json), home, json)


@app.command()
def remove(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name, short id or id.")],
    home: Home = None,
    json: Json = False,
) -> None:
    """Trust a device no longer (on this device)."""
    from confidantd.cli.pairing import remove_member

    _run(lambda client: remove_member(client, device, as_json=json), home, json)


@app.command()
def invite(home: Home = None, json: Json = False) -> None:
    """Pair by a short code (not there yet)."""
    _not_yet(json)


@app.command()
def join(code: str, home: Home = None, json: Json = False) -> None:
    """Pair by a short code (not there yet)."""
    _not_yet(json)


@app.command()
def leave(home: Home = None, json: Json = False) -> None:
    """Leave the swarm (not there yet)."""
    _not_yet(json)


def _not_yet(as_json: bool) -> None:
    from confidantd.cli.output import print_error

    failure = ConfidantError("pairing by a short code is not part of this version", PAIRING_HINT)
    print_error(failure, as_json=as_json)
    raise typer.Exit(1)


@app.command()
def plan(
    model: Model,
    train: Annotated[bool, typer.Option("--train", help="Plan for training (default).")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Plan for generation.")] = False,
    method: Method = "full",
    rank: Annotated[int | None, typer.Option()] = None,
    target_modules: Targets = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    microbatches: Annotated[int | None, typer.Option()] = None,
    sequence_length: Annotated[int | None, typer.Option()] = None,
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    devices: Devices = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Which device would hold which layers, and what that costs. Nothing starts."""
    if train and generate:
        raise typer.BadParameter("--train and --generate exclude each other")
    options = {
        "method": method,
        "rank": rank,
        "target_modules": _names(target_modules),
        "batch_size": batch_size,
        "microbatches": microbatches,
        "sequence_length": sequence_length,
        "max_new_tokens": max_new_tokens,
        "devices": _names(devices),
    }
    body = {
        "model": _path(model),
        "objective": "generate" if generate else "train",
        "options": _given(options),
    }

    async def work(client: Any) -> None:
        from confidantd.cli import tables
        from confidantd.cli.output import console, print_json

        fields = await client.post("/v1/plan", body)
        if json:
            print_json(fields)
        else:
            console().print(tables.plan(fields))

    _run(work, home, json)


@app.command()
def train(
    model: Model,
    data: Annotated[
        list[Path], typer.Option("--data", metavar="FILE...", help="Text or JSONL; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="New folder.")],
    more_data: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", hidden=True)] = None,
    method: Method = "full",
    rank: Annotated[int | None, typer.Option(help="LoRA rank [8]")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha [16]")] = None,
    target_modules: Targets = None,
    init_adapter: Annotated[Path | None, typer.Option(help="peft adapter to start from")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the data [1]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="sequences a step [8]")] = None,
    microbatches: Annotated[int | None, typer.Option(help="parts of a batch")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="tokens [128]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[2e-5, LoRA 2e-4]")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="[3 % of the steps]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[0]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="0: no clipping [1.0]")] = None,
    seed: Annotated[int | None, typer.Option(help="[0]")] = None,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="File order.")] = False,
    eval_data: Annotated[Path | None, typer.Option(metavar="FILE", help="held-out text")] = None,
    eval_every: Annotated[int | None, typer.Option(metavar="N", help="steps")] = None,
    devices: Devices = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job id and end.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow to the end (default).")] = False,
    home: Home = None,
    json: Json = False,
) -> None:
    """Fine-tune MODEL on text; the result is a checkpoint or a LoRA adapter in DIR."""
    if steps is not None and epochs is not None:
        raise typer.BadParameter("--steps and --epochs exclude each other")
    if detach and wait:
        raise typer.BadParameter("--detach and --wait exclude each other")
    request = {
        "model": _path(model),
        "data": [_path(path) for path in [*data, *(more_data or [])]],
        "output": _path(output),
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "target_modules": _names(target_modules),
        "init_adapter": _path(init_adapter),
        "task": task,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "microbatches": microbatches,
        "sequence_length": sequence_length,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "shuffle": not no_shuffle,
        "eval_data": _path(eval_data),
        "eval_every": eval_every,
        "devices": _names(devices),
    }
    from confidantd.cli.training import run_training

    _run(
        lambda client: run_training(client, _given(request), detach=detach, as_json=json),
        home,
        json,
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT")],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="LoRA adapter")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", help="[128]")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy [0]")] = None,
    top_p: Annotated[float | None, typer.Option(help="[1.0]")] = None,
    seed: Annotated[int | None, typer.Option(help="[0]")] = None,
    devices: Devices = None,
    home: Home = None,
    json: Json = False,
) -> None:
    """Continue a prompt; the text streams as it comes."""
    request = {
        "model": _path(model),
        "prompt": prompt,
        "adapter": _path(adapter),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "devices": _names(devices),
    }
    from confidantd.cli.generating import run_generation

    _run(lambda client: run_generation(client, _given(request), as_json=json), home, json)


@jobs_app.callback()
def jobs(context: typer.Context, home: Home = None, json: Json = False) -> None:
    """Jobs of this device, the newest first."""
    if context.invoked_subcommand is None:
        _show("/v1/jobs", "jobs", home, json)


@jobs_app.command("list")
def jobs_list(home: Home = None, json: Json = False) -> None:
    """Jobs of this device, the newest first."""
    _show("/v1/jobs", "jobs", home, json)


@jobs_app.command("show")
def jobs_show(job: str, home: Home = None, json: Json = False) -> None:
    """All that is known of a job."""
    _show(f"/v1/jobs/{_part(job)}", "job", home, json)


@jobs_app.command("watch")
def jobs_watch(job: str, home: Home = None, json: Json = False) -> None:
    """Follow a job to its end."""
    from confidantd.cli.training import watch_job

    _run(lambda client: watch_job(client, _part(job), as_json=json), home, json)


@jobs_app.command("cancel")
def jobs_cancel(job: str, home: Home = None, json: Json = False) -> None:
    """End a job; its stages are freed and nothing is written."""
    _post(f"/v1/jobs/{_part(job)}/cancel", "cancelled {job}", home, json)


@jobs_app.command("resume")
def jobs_resume(job: str, home: Home = None, json: Json = False) -> None:
    """Go on with a job that was interrupted (not there yet)."""
    _post(f"/v1/jobs/{_part(job)}/resume", "resumed {job}", home, json)


def _part(job: str) -> str:
    """A job id as part of a path."""
    from urllib.parse import quote

    return quote(job, safe="")


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="[a new one]")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Three daemons on this machine find each other, fine-tune a small model and use it."""
    from confidantd.cli.demo import run_demo

    raise typer.Exit(run_demo(folder, as_json=json))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"confidant {confidantd.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune and run a language model together with the devices on this network."""


def main() -> None:
    """Entry point of the `confidant` command."""
    app()


if __name__ == "__main__":
    main()
