"""Which parts of a running job move when its plan changes; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from confidantd.models.adapter import adapter_tensor_names
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.models.stage_parts import EMBEDDING, HEAD, Part, kept_parts, stage_parts
from confidantd.models.tensors import stage_tensor_names
from confidantd.planner.plan import StagePlan
from confidantd.planner.replan import continued
from confidantd.wire.worker import Export


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


def ordered(parts: Iterable[Part]) -> list[Part]:
    """Layers in order, then the ends."""
    return sorted(parts, key=lambda part: (isinstance(part, str), part))
