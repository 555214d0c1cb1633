"""What a user may ask for, with the defaults of the command-line contract, checked by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from confidantd.errors import DataError, ModelError, OutputError, ProtocolError, UsageError
from confidantd.models.imported import is_file_model
from confidantd.wire.codec import from_map
from confidantd.wire.jobs import OwnerEnds
from confidantd.wire.passes import MOST_ROWS
from confidantd.wire.sampling import Sampling

_T = TypeVar("_T")

TASKS = ("causal-lm",)
SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("full", "lora")
DEFAULT_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
DEFAULT_SEQUENCE_LENGTH = 128
DEFAULT_NEW_TOKENS = 128
MOST_STOPS, MOST_STOP_LETTERS = 16, 1_000
DEFAULT_LOAD, MOST_LOAD = 8, 100_000  # requests at once
DEFAULT_CONTEXT = 2_048  # tokens of a served request, or what the model takes
DEFAULT_WAITING = 64  # requests
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,200}")


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of `confidant train`. None: the default depends on the model or on other options."""

    model: str
    data: tuple[str, ...]
    output: str
    method: str = "full"
    task: str = "causal-lm"
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    init_adapter: str | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    microbatches: int | None = None
    sequence_length: int | None = None
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    shuffle: bool = True
    eval_data: str | None = None
    eval_every: int | None = None
    devices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    owner_ends: OwnerEnds = "auto"

    def check(self) -> None:
        """Raise what is wrong with the options themselves; files are looked at later."""
        _one_of("--task", self.task, TASKS)
        _one_of("--method", self.method, METHODS)
        _one_of("--schedule", self.schedule, SCHEDULES)
        _one_of("--owner-ends", self.owner_ends, get_args(OwnerEnds))
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs exclude each other")
        for name in ("steps", "epochs", "batch_size", "microbatches", "rank", "eval_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("sequence_length", self.sequence_length, 2)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "learning_rate"):
            _at_least(name, getattr(self, name), 0)
        if self.microbatches is not None and self.batch_size % self.microbatches:
            raise UsageError(
                f"a batch of {self.batch_size} cannot be cut into {self.microbatches} microbatches",
                "choose --microbatches so that it divides --batch-size",
            )
        lora_only = ("rank", "alpha", "target_modules", "init_adapter")
        if self.method == "full":
            for name in lora_only:
                if getattr(self, name) is not None:
                    raise UsageError(f"{_flag(name)} needs --method lora")
        if self.eval_every is not None and self.eval_data is None:
            raise UsageError("--eval-every needs --eval-data")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return DEFAULT_LEARNING_RATE[self.method]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of `confidant plan`: those of train and generate that change a plan.

    `load`: requests at once, of the objective `serve`; `context`: tokens of each. `what_if`: a
    file with a fleet to plan for, instead of the swarm.
    """

    model: str
    objective: str = "train"
    method: str = "full"
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    batch_size: int = 8
    microbatches: int | None = None
    sequence_length: int | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    quantise: str = "none"
    devices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    owner_ends: OwnerEnds = "auto"
    load: int | None = None
    context: int | None = None
    what_if: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of `confidant generate`."""

    model: str
    prompt: str
    adapter: str | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seed: int = 0
    speculation: str = "auto"
    quantise: str = "none"
    devices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise what is wrong with the options themselves."""
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        self.sampling.check()
        _one_of("--speculation", self.speculation, ("auto", "off"))
        if len(self.stop) > MOST_STOPS or max(map(len, self.stop), default=0) > MOST_STOP_LETTERS:
            raise UsageError(
                f"--stop takes up to {MOST_STOPS} texts of up to {MOST_STOP_LETTERS} letters"
            )

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
            self.seed,
            self.logprobs,
        )


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of `confidant serve`: `requests` at once, each with so many tokens of prompt and
    answer together as `context`. `stays`: another run of the daemon goes on serving it.
    `private`: only for who asks over the daemon's socket.
    """

    model: str
    name: str | None = None
    adapter: str | None = None
    requests: int = DEFAULT_LOAD
    context: int | None = None
    most_waiting: int = DEFAULT_WAITING
    chat_template: str | None = None
    speculation: str = "auto"
    quantise: str = "none"
    devices: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    stays: bool = False
    private: bool = False

    def check(self) -> None:
        """Raise what is wrong with the options themselves."""
        _at_least("requests", self.requests, 1)
        _at_least("context", self.context, 2)
        _at_least("most_waiting", self.most_waiting, 0)
        _one_of("--speculation", self.speculation, ("auto", "off"))
        if self.requests > MOST_ROWS:
            raise UsageError(f"--requests must be at most {MOST_ROWS}")
        if not _NAME.fullmatch(self.public_name):
            raise UsageError(
                f"{self.public_name[:60]!r} cannot be the name of a model",
                "give --name up to 200 letters without spaces",
            )

    @property
    def public_name(self) -> str:
        """What clients call it: the folder's name, with an adapter's behind it."""
        if self.name is not None:
            return self.name
        base = Path(self.model).name
        return base if self.adapter is None else f"{base}:{Path(self.adapter).name}"


def check_layers(devices: tuple[str, ...], layers: tuple[int, ...], of: int) -> None:
    """`--layers` says how many of the model's layers each of `--devices` gets."""
    if not layers:
        return
    if len(set(devices)) != len(layers):
        raise UsageError(
            f"--layers has {len(layers)} numbers for {len(set(devices))} devices",
            "name as many --devices, in the order of the layers",
        )
    if min(layers) < 1:
        raise UsageError("every device of --layers needs one layer at least")
    if sum(layers) != of:
        raise UsageError(f"--layers add up to {sum(layers)}, the model has {of} layers")


def options_from(cls: type[_T], request: Mapping[str, Any]) -> _T:
    """The options in a JSON request; nulls mean the default; `UsageError` names a wrong field."""
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(request) - known)
    if unknown:
        raise UsageError(f"there is no option {_flag(unknown[0][:40])}")
    given = {name: value for name, value in request.items() if value is not None}
    try:
        return from_map(cls, given)
    except ProtocolError as failure:
        raise UsageError(failure.message) from None


def model_folder(path: str) -> Path:
    """The model's folder, or the file that it is; `ModelError` if there is none."""
    folder = Path(path)
    if not folder.is_dir() and not is_file_model(path):
        raise ModelError(
            f"there is no model folder {path}",
            "give a folder with config.json, *.safetensors and tokenizer files, or a .gguf file",
        )
    return folder


def check_output(path: str) -> Path:
    """The output folder, which must be absent or empty, in a folder that can be written."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{path} is a file", "give a new folder to --output")
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(
                f"the output folder {path} is not empty", "give a new or empty folder to --output"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        probe = folder.parent / f".{folder.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as failure:
        raise OutputError(
            f"the output folder {path} cannot be written ({failure.strerror})",
            "choose another folder or change its permissions",
        ) from None
    return folder


def check_files(paths: tuple[str, ...]) -> None:
    """Every data file must be there."""
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"there is no data file {path}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} {value[:40]} is not one of {', '.join(allowed)}")


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise UsageError(f"{_flag(name)} must be at least {least}")
