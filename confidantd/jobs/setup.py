"""Turns options into what every job needs: model, adapter, plan request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from confidantd.errors import ModelError, UsageError
from confidantd.ids import JobId
from confidantd.jobs.options import (
    DEFAULT_CONTEXT,
    DEFAULT_LOAD,
    DEFAULT_SEQUENCE_LENGTH,
    MOST_LOAD,
    GenerateOptions,
    PlanOptions,
    ServeOptions,
    TrainOptions,
    check_layers,
    model_folder,
)
from confidantd.models.adapter import read_adapter
from confidantd.models.folder import ModelFolder, read_model
from confidantd.models.quantisation import own_spec, quantised_spec
from confidantd.models.safetensors import TensorLocation
from confidantd.models.spec import LoraSpec, Method, ModelSpec, ProgramRequest
from confidantd.models.tensors import check_targets, default_targets
from confidantd.wire.jobs import OwnerEnds, PlanRequest

DEFAULT_RANK = 8
DEFAULT_ALPHA = 16.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and what shall be done with it. `microbatches` 0: the plan will choose; `load`: so
    many requests are served at once.
    """

    model: ModelFolder
    method: Method | None
    lora: LoraSpec | None
    adapter: Mapping[str, TensorLocation]
    batch_size: int
    microbatches: int
    sequence_length: int
    layers: tuple[int, ...] = ()  # of each device, where the user insists
    owner_ends: OwnerEnds = "auto"
    load: int = 0
    quantise: str = "none"

    @property
    def spec(self) -> ModelSpec:
        """The model as the job computes with it. Training needs all bits."""
        if self.method is None and self.quantise == "none":
            return own_spec(self.model.spec, self.model.formats)
        return quantised_spec(self.model.spec, self.quantise)

    def plan_request(self, job: JobId, epoch: int, devices: tuple[str, ...]) -> PlanRequest:
        """What the coordinator needs to plan this."""
        return PlanRequest(
            job=job,
            epoch=epoch,
            model_name=self.model.source.name,
            model=self.spec,
            objective="train" if self.method else "serve" if self.load else "generate",
            method=self.method,
            lora=self.lora,
            batch_size=self.batch_size,
            microbatches=self.microbatches,
            sequence_length=self.sequence_length,
            devices=devices,
            layers=self.layers,
            owner_ends=self.owner_ends,
            load=self.load,
        )

    def program_request(self) -> ProgramRequest:
        """What the compiler needs to know."""
        rows = self.batch_size // self.microbatches
        return ProgramRequest.of(self.spec, self.method, self.lora, rows, self.sequence_length)


def train_workload(options: TrainOptions | PlanOptions) -> Workload:
    """Read the model (and the adapter to start from) and check the options against it."""
    model = read_model(model_folder(options.model))
    method: Method = "lora" if options.method == "lora" else "full"
    adapter_folder = getattr(options, "init_adapter", None)
    lora: LoraSpec | None = None
    adapter: Mapping[str, TensorLocation] = {}
    if method == "lora":
        lora, adapter = _lora(model, options, adapter_folder)
    TrainOptions(
        options.model, (), "", batch_size=options.batch_size, microbatches=options.microbatches
    ).check()
    length = options.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, model.spec.max_positions)
    if length > model.spec.max_positions:
        raise UsageError(
            f"a sequence of {length} tokens is longer than the model allows "
            f"({model.spec.max_positions})",
            "lower --sequence-length",
        )
    check_layers(options.devices, options.layers, model.spec.layers)
    if options.layers and options.owner_ends == "always":
        raise UsageError("--layers and --owner-ends always exclude each other")
    return Workload(
        model,
        method,
        lora,
        adapter,
        options.batch_size,
        options.microbatches or 0,
        length,
        options.layers,
        options.owner_ends,
    )


def generate_workload(options: GenerateOptions | PlanOptions, prompt_tokens: int = 0) -> Workload:
    """Read the model and the adapter; room for prompt and new tokens is `sequence_length`."""
    model = read_model(model_folder(options.model))
    lora: LoraSpec | None = None
    adapter: Mapping[str, TensorLocation] = {}
    folder = getattr(options, "adapter", None)
    if folder is not None:
        lora, adapter = read_adapter(_adapter_folder(folder), model.spec)
    length = prompt_tokens + options.max_new_tokens
    check_layers(options.devices, options.layers, model.spec.layers)
    room = min(length, model.spec.max_positions)
    quantised_spec(model.spec, options.quantise)  # refuses what there is not
    return Workload(
        model, None, lora, adapter, 1, 1, room, options.layers, quantise=options.quantise
    )


def serve_workload(options: ServeOptions) -> Workload:
    """Read the model and the adapter; room for each request is `sequence_length`."""
    most = read_model(model_folder(options.model)).spec.max_positions
    context = min(options.context or DEFAULT_CONTEXT, most)
    if options.context is not None and options.context > most:
        raise UsageError(
            f"a context of {options.context} tokens is longer than the model allows ({most})",
            "lower --context",
        )
    given = GenerateOptions(
        options.model, "", options.adapter, context,
        quantise=options.quantise, devices=options.devices, layers=options.layers,
    )  # fmt: skip
    return replace(generate_workload(given), load=options.requests)


def planned_workload(options: PlanOptions) -> Workload:
    """What `confidant plan` is asked about."""
    for name in ("load", "context"):
        if getattr(options, name) is not None and options.objective != "serve":
            raise UsageError(f"--{name} needs --serve")
    if options.quantise != "none" and options.objective == "train":
        raise UsageError("--quantise needs --generate or --serve: training needs all bits")
    match options.objective:
        case "train":
            return train_workload(options)
        case "generate":
            return generate_workload(options)
        case "serve":
            load = DEFAULT_LOAD if options.load is None else options.load
            if not 1 <= load <= MOST_LOAD:
                raise UsageError(f"--load must be 1 to {MOST_LOAD}")
            return serve_workload(
                ServeOptions(
                    options.model, requests=load, context=options.context,
                    quantise=options.quantise, devices=options.devices, layers=options.layers,
                )
            )  # fmt: skip
        case other:
            raise UsageError(f"there is no objective {other[:40]}", "train, generate or serve")


def _lora(
    model: ModelFolder, options: TrainOptions | PlanOptions, folder: str | None
) -> tuple[LoraSpec, dict[str, TensorLocation]]:
    if folder is None:
        targets = options.target_modules or default_targets(model.spec)
        check_targets(model.spec, targets)
        alpha = DEFAULT_ALPHA if options.alpha is None else options.alpha
        return LoraSpec(options.rank or DEFAULT_RANK, alpha, tuple(targets)), {}
    lora, adapter = read_adapter(_adapter_folder(folder), model.spec)
    if options.rank not in (None, lora.rank):
        raise UsageError(f"--rank {options.rank} differs from the adapter's rank {lora.rank}")
    return lora, adapter


def _adapter_folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"there is no adapter in {path}",
            "give a folder with adapter_config.json and adapter_model.safetensors",
        )
    return folder
