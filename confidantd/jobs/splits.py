"""How this device shares out blocks between its backends: what it remembers, and for whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from confidantd.config import Split
from confidantd.ids import digest_of
from confidantd.models.programs import request_key
from confidantd.models.spec import Form, ProgramRequest
from confidantd.planner.split_choice import choose_block, from_json, shares_of
from confidantd.profile.providers import Provider, present_names
from confidantd.wire.jobs import BackendsAnswer
from confidantd.wire.stage import BackendShare, StageSpec


class Splits:
    """Profiles of block shapes in a folder, one file for each set of backends and threads."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        split: Split,
        providers: Callable[[], tuple[Provider, ...]],
    ) -> None:
        self._folder = folder
        self._threads = threads
        self.split = split
        self._providers = providers

    def backends(self) -> tuple[str, ...]:
        """The backends that a stage here uses, the CPU's first."""
        return present_names(self._providers()) or ("cpu",)

    def file(self, request: ProgramRequest, form: Form) -> Path:
        """Where what was measured of this shape is kept."""
        versions = [f"{p.name} {p.version}" for p in self._providers() if p.present]
        shape = request_key(replace(request, split=True))
        key = [shape, form, self._threads, sorted(versions)]
        return self._folder / f"{digest_of(json.dumps(key).encode())}.json"

    def answer(self, request: ProgramRequest, form: Form) -> BackendsAnswer:
        """What the planner shows; reads a file."""
        try:
            profile = from_json(self.file(request, form).read_bytes())
        except OSError:
            return BackendsAnswer()
        if profile is None:
            return BackendsAnswer()
        block = request.model.block
        choice = choose_block(profile, block.kv_heads, block.columns, self.split)
        shares = shares_of(choice, block.heads, block.kv_heads, block.columns)
        return BackendsAnswer(tuple(BackendShare(*share) for share in shares), choice.seconds)


def program_request(spec: StageSpec) -> ProgramRequest:
    """The programs that a stage's blocks are run by."""
    rows, length = spec.microbatch_size, spec.sequence_length
    return ProgramRequest.of(spec.model, spec.training, spec.lora, rows, length)
