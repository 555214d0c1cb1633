"""Which parts of a running job move when its plan changes; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from confidantd.ids import DeviceId
from confidantd.models.adapter import adapter_tensor_names
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.models.stage_parts import EMBEDDING, HEAD, Part, kept_parts, stage_parts
from confidantd.models.tensors import stage_tensor_names
from confidantd.planner.plan import StagePlan
from confidantd.wire.worker import Export

Held = Mapping[DeviceId, frozenset[Part]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a device has to load for its stage."""

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


def held_parts(stages: Iterable[StagePlan]) -> dict[DeviceId, frozenset[Part]]:
    """What each device of a plan holds."""
    return {stage.device: parts_of_plan(stage) for stage in stages}


def parts_of_plan(stage: StagePlan) -> frozenset[Part]:
    """Layers and ends of a planned stage."""
    return stage_parts(
        stage.first_layer, stage.past_last_layer, embedding=stage.embedding, head=stage.head
    )


def wanted(device: DeviceId, parts: frozenset[Part], held: Held, *, tied: bool) -> Wanted:
    """What a device lacks of a stage, by what it holds now."""
    return Wanted(parts - kept_parts(held.get(device, frozenset()), parts, tied=tied))


def exports(old: Sequence[StagePlan], new: Sequence[StagePlan], *, tied: bool) -> dict[int, Export]:
    """What each old stage has to hand over: every part that some device lacks, once."""
    held = held_parts(old)
    missing: set[Part] = set()
    for stage in new:
        missing |= wanted(stage.device, parts_of_plan(stage), held, tied=tied).parts
    found = {}
    for index, stage in enumerate(old):
        parts = parts_of_plan(stage) & missing
        if parts:
            layers = tuple(part for part in ordered(parts) if isinstance(part, int))
            found[index] = Export(layers, EMBEDDING in parts, HEAD in parts)
    return found


def ordered(parts: Iterable[Part]) -> list[Part]:
    """Layers in order, then the ends."""
    return sorted(parts, key=lambda part: (isinstance(part, str), part))
