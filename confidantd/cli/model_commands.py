"""What is done with a model: options become a request; the daemon knows the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from confidantd.cli.option_types import (
    COUNT,
    WHOLE,
    amount,
    counts,
    names,
    options,
    path,
    portion,
    positive,
    share,
)
from confidantd.cli.run import common, json_wanted, run

METHODS = click.Choice(["full", "lora"])
SCHEDULES = click.Choice(["constant", "linear", "cosine"])

_model = click.argument("model", metavar="MODEL", type=path)
_devices = options(
    click.option("--devices", metavar="NAME,...", type=names, help="Use exactly these."),
    click.option(
        "--layers", metavar="N,...", type=counts, help="So many on each of --devices, in order."
    ),
)
_quantise = click.option(
    "--quantise",
    metavar="FORMAT",
    help="int8 or int4: smaller and faster, a little less exact. [default: none]",
)
_speculation = click.option(
    "--speculation",
    type=click.Choice(["auto", "off"]),
    help="Guess tokens ahead where that is faster; it changes no token. [default: auto]",
)
_shape = options(  # what changes a plan
    click.option("--method", type=METHODS, help="What is trained. [default: full]"),
    click.option("--rank", metavar="R", type=COUNT, help="LoRA rank. [default: 8]"),
    click.option("--target-modules", metavar="a,b,...", type=names, help="LoRA targets."),
    click.option("--batch-size", metavar="B", type=COUNT, help="Sequences a step. [default: 8]"),
    click.option(
        "--microbatches", metavar="M", type=COUNT, help="Parts of a batch. [default: the fastest]"
    ),
    click.option(
        "--sequence-length",
        metavar="S",
        type=click.IntRange(min=2),
        help="Tokens a sequence. [default: 128]",
    ),
    _devices,
    click.option(
        "--owner-ends",
        type=click.Choice(["auto", "always", "never"]),
        help="Keep text and labels here: embedding and head both on this device. [default: auto]",
    ),
)
_course = options(  # what changes the result
    click.option("--task", type=click.Choice(["causal-lm"]), help="[default: causal-lm]"),
    click.option("--steps", metavar="N", type=COUNT, help="Updates; or else:"),
    click.option("--epochs", metavar="N", type=COUNT, help="passes over the data. [default: 1]"),
    click.option("--learning-rate", metavar="X", type=amount, help="[default: 2e-5, LoRA 2e-4]"),
    click.option("--schedule", type=SCHEDULES, help="[default: linear]"),
    click.option("--warmup-steps", metavar="N", type=WHOLE, help="[default: 3 % of the steps]"),
    click.option("--weight-decay", metavar="X", type=amount, help="[default: 0]"),
    click.option("--max-grad-norm", metavar="X", type=amount, help="0: none. [default: 1.0]"),
    click.option("--seed", metavar="N", type=WHOLE, help="[default: 0]"),
    click.option("--no-shuffle", is_flag=True, help="Blocks in file order."),
    click.option("--alpha", metavar="X", type=positive, help="LoRA alpha. [default: 16]"),
    click.option("--init-adapter", metavar="DIR", type=path, help="A peft adapter to start from."),
    click.option("--eval-data", metavar="FILE", type=path, help="Held-out text."),
    click.option("--eval-every", metavar="N", type=COUNT, help="Steps between evaluations."),
)


@click.command()
@_model
@click.option("--train", "objective", flag_value="train", default="train", help="For training.")
@click.option("--generate", "objective", flag_value="generate", help="For generation.")
@click.option("--serve", "objective", flag_value="serve", help="For many requests at once.")
@click.option("--load", metavar="N", type=COUNT, help="Requests at once of --serve. [default: 8]")
@click.option("--context", metavar="N", type=COUNT, help="Tokens of each. [default: 2048]")
@_shape
@_quantise
@click.option(
    "--what-if", metavar="FILE", type=path, help="Plan for the devices in a TOML file instead."
)
@common
def plan(model: Path, objective: str, **given: Any) -> None:
    """Which device would hold which layers of MODEL, and what that costs; nothing starts."""
    for name in ("load", "context"):
        if given[name] is not None and objective != "serve":
            raise click.UsageError(f"--{name} needs --serve.")
    from confidantd.cli.planning import run_plan

    body = {"model": str(model), "objective": objective, "options": _request(given)}
    as_json = json_wanted()
    run(lambda client: run_plan(client, body, as_json=as_json))


@click.command()
@_model
@click.argument("more_data", metavar="", nargs=-1, type=path)  # `--data A B`: B lands here
@click.option(
    "--data", metavar="FILE...", type=path, multiple=True, required=True, help="Text or JSONL."
)
@click.option(
    "--output", metavar="DIR", type=path, required=True, help="New or empty folder for the result."
)
@_shape
@_course
@click.option("--detach", is_flag=True, help="Print the job's id and end.")
@click.option("--wait", is_flag=True, help="Follow the job to its end (the default).")
@common
def train(detach: bool, wait: bool, **given: Any) -> None:
    """Fine-tune MODEL on text; the result is a checkpoint, or a LoRA adapter, in DIR."""
    if given["steps"] is not None and given["epochs"] is not None:
        raise click.UsageError("--steps and --epochs exclude each other.")
    if detach and wait:
        raise click.UsageError("--detach and --wait exclude each other.")
    given["data"] = [*given["data"], *given.pop("more_data")]
    given["shuffle"] = not given.pop("no_shuffle")
    from confidantd.cli.training import run_training

    request, as_json = _request(given), json_wanted()
    run(lambda client: run_training(client, request, detach=detach, as_json=as_json))


@click.command()
@_model
@click.option("--prompt", metavar="TEXT", required=True)
@click.option("--adapter", metavar="DIR", type=path, help="A LoRA adapter in peft's form.")
@click.option("--max-new-tokens", metavar="N", type=COUNT, help="[default: 128]")
@click.option("--temperature", metavar="T", type=amount, help="0: greedy. [default: 0]")
@click.option(
    "--top-p",
    metavar="P",
    type=share,
    help="Sample from the likeliest tokens of this total probability. [default: 1]",
)
@click.option("--top-k", metavar="K", type=WHOLE, help="Of so many; 0: of all. [default: 0]")
@click.option(
    "--min-p", metavar="P", type=portion, help="Not less likely than the likeliest times P."
)
@click.option(
    "--repetition-penalty", metavar="X", type=positive, help="Over 1: less of what was there."
)
@click.option("--seed", metavar="N", type=WHOLE, help="Of the sampling. [default: 0]")
@_speculation
@click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; repeatable.")
@click.option(
    "--logprobs", metavar="N", type=WHOLE, help="Tell probabilities, of N likeliest tokens too."
)
@_quantise
@_devices
@common
def generate(**given: Any) -> None:
    """Continue a prompt with MODEL; the text streams as it comes."""
    given["stop"] = given["stop"] or None
    from confidantd.cli.generating import run_generation

    request, as_json = _request(given), json_wanted()
    run(lambda client: run_generation(client, request, as_json=as_json))


@click.command()
@_model
@click.option("--name", metavar="NAME", help="What clients call it. [default: the folder's name]")
@click.option("--adapter", metavar="DIR", type=path, help="A LoRA adapter in peft's form.")
@click.option("--requests", metavar="N", type=COUNT, help="Answered at once. [default: 8]")
@click.option(
    "--context", metavar="N", type=COUNT, help="Tokens of a request and its answer. [default: 2048]"
)
@click.option(
    "--most-waiting", metavar="N", type=WHOLE, help="More requests are refused. [default: 64]"
)
@click.option(
    "--chat-template", metavar="FILE", type=path, help="Another one than the model's, in Jinja."
)
@_speculation
@_quantise
@_devices
@click.option("--detach", is_flag=True, help="Go on until `confidant jobs cancel`.")
@common
def serve(detach: bool, **given: Any) -> None:
    """Answer programs on this device with MODEL, over OpenAI's API."""
    from confidantd.cli.serving import run_serving

    request, as_json = {**_request(given), "stays": detach}, json_wanted()
    run(lambda client: run_serving(client, request, as_json=as_json))


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--max-new-tokens", metavar="N", type=COUNT, help="Of an answer. [default: no limit]")
@click.option("--temperature", metavar="T", type=amount, help="0: greedy. [default: 0.7]")
@click.option("--top-p", metavar="P", type=share, help="[default: 1]")
@click.option(
    "--seed", metavar="N", type=WHOLE, help="Of the sampling. [default: another each time]"
)
@click.option("--adapter", metavar="DIR", type=path, help="A LoRA adapter in peft's form.")
@click.option("--context", metavar="N", type=COUNT, help="Tokens of the chat. [default: 2048]")
@click.option(
    "--chat-template", metavar="FILE", type=path, help="Another one than the model's, in Jinja."
)
@_quantise
@_devices
@common
def chat(model: str, **given: Any) -> None:
    """Talk to MODEL: a folder, a GGUF file, or the name of a model that is served. Ctrl-C stops
    an answer, Ctrl-D ends the chat.
    """
    from confidantd.cli.chatting import run_chat

    asked = {n: given.pop(n) for n in ("max_new_tokens", "temperature", "top_p", "seed")}
    system, as_json = given.pop("system"), json_wanted()
    served = _request(given)
    run(lambda client: run_chat(client, model, served, _request(asked), system, as_json=as_json))


def _request(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as JSON."""
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _plain(value: Any) -> Any:
    match value:
        case Path():
            return str(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
