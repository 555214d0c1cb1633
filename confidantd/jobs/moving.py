"""Which parts of a running job move when its plan changes; pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from confidantd.errors import ProtocolError
from confidantd.ids import DeviceId
from confidantd.models.adapter import adapter_sources, adapter_tensor_names
from confidantd.models.spec import LoraSpec, Method, ModelSpec
from confidantd.models.stage_parts import EMBEDDING, HEAD, Part, kept_parts, ordered, stage_parts
from confidantd.models.tensors import (
    Source,
    block_sources,
    embedding_sources,
    head_sources,
    stage_tensor_names,
)
from confidantd.planner.plan import StagePlan
from confidantd.planner.replan import continued
from confidantd.wire.stage import StateEntry
from confidantd.wire.worker import STATE_BYTES, Export, StateBlob

Share = tuple[DeviceId, int]  # a device, and how many layers it gets


@dataclass(frozen=True, slots=True)
class Wanted:
    """What has to be loaded for a stage."""

    parts: frozenset[Part]

    def tensor_names(self, model: ModelSpec) -> tuple[str, ...]:
        """Checkpoint names."""
        found: dict[str, None] = {}
        for part in ordered(self.parts):
            layers = (part, part + 1) if isinstance(part, int) else (0, 0)
            names = stage_tensor_names(model, *layers, part == EMBEDDING, part == HEAD)
            found |= dict.fromkeys(names)
        return tuple(found)

    def adapter_names(self, model: ModelSpec, lora: LoraSpec | None) -> tuple[str, ...]:
        """Names of an adapter's tensors."""
        if lora is None:
            return ()
        layers = [part for part in ordered(self.parts) if isinstance(part, int)]
        return tuple(
            name for layer in layers for name in adapter_tensor_names(model, lora, layer, layer + 1)
        )


def parts_of_plan(stage: StagePlan) -> frozenset[Part]:
    """Layers and ends of a planned stage."""
    return stage_parts(
        stage.first_layer, stage.past_last_layer, embedding=stage.embedding, head=stage.head
    )


def wanted(old: Sequence[StagePlan], new: Sequence[StagePlan], *, tied: bool) -> tuple[Wanted, ...]:
    """What each new stage lacks of what its device goes on from."""
    following = continued([s.device for s in old], [s.device for s in new])
    found = []
    for place, stage in enumerate(new):
        parts, before = parts_of_plan(stage), following.get(place)
        if before is not None:
            parts -= kept_parts(parts_of_plan(old[before]), parts, tied=tied)
        found.append(Wanted(parts))
    return tuple(found)


def takeover(stages: Sequence[StagePlan], away: Collection[int]) -> tuple[Share, ...]:
    """The devices that are left with their numbers of layers, when each gets what those behind
    it held: it has spares of that. The owner is first, or what the first held goes to the next.
    Empty where that is no straight pipeline, or nobody is left.
    """
    found: list[Share] = []
    ahead = 0
    for index, stage in enumerate(stages):
        layers = stage.past_last_layer - stage.first_layer
        if index not in away:
            found.append((stage.device, ahead + layers))
            ahead = 0
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + layers)
        else:
            ahead += layers
    straight = len({device for device, _ in found}) == len(found)
    return tuple(found) if straight and all(layers for _, layers in found) else ()


def exports(old: Sequence[StagePlan], new: Sequence[StagePlan], *, tied: bool) -> dict[int, Export]:
    """What each old stage has to hand over: every part that some stage lacks, once."""
    missing = frozenset[Part]().union(*(w.parts for w in wanted(old, new, tied=tied)))
    found = {}
    for index, stage in enumerate(old):
        parts = parts_of_plan(stage) & missing
        if parts:
            layers = tuple(part for part in ordered(parts) if isinstance(part, int))
            found[index] = Export(layers, EMBEDDING in parts, HEAD in parts)
    return found


def whole_stage(
    model: ModelSpec, method: Method | None, lora: LoraSpec | None, stage: StagePlan
) -> dict[str, int]:
    """Name and number of elements of every tensor that a stage trains."""
    layers = tuple(range(stage.first_layer, stage.past_last_layer))
    return trained_sizes(model, method, lora, Export(layers, stage.embedding, stage.head))


def trained_sizes(
    model: ModelSpec, method: Method | None, lora: LoraSpec | None, command: Export
) -> dict[str, int]:
    """Name and number of elements of every tensor that an export must give."""
    sources: list[Source] = []
    if method == "lora" and lora is not None:
        for layer in command.layers:
            sources += adapter_sources(model, lora, layer)
    elif method == "full":
        for layer in command.layers:
            sources += block_sources(model, layer)
        sources += embedding_sources(model) if command.embedding else ()
        sources += head_sources(model) if command.head else ()
    return {source.name: math.prod(source.shape) for source in sources}


def handed_over(
    blobs: Iterable[StateBlob], sizes: Mapping[str, int], device: DeviceId
) -> dict[str, StateEntry]:
    """What a stage has written of its state, by tensor name; ProtocolError unless it is just
    what it was asked for: weights that were forgotten would come from the checkpoint, untrained.
    """
    entries: dict[str, StateEntry] = {}
    written = 0
    for blob in blobs:
        if blob.digest is None:
            raise ProtocolError("a stage has handed over a state that is not stored")
        offset = 0
        for tensor in blob.tensors:
            entries[tensor.name] = StateEntry(
                tensor.name, tensor.size, blob.bytes, blob.digest, device, offset
            )
            offset += STATE_BYTES * tensor.size
            written += 1
    if written != len(entries) or {n: e.size for n, e in entries.items()} != sizes:
        raise ProtocolError("a stage has handed over other tensors than it was asked for")
    return entries
