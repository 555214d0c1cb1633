"""What a job uses of the device it runs on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from confidantd.errors import IdentityConflictError
from confidantd.ids import DeviceId
from confidantd.jobs.importing import Importer
from confidantd.jobs.peers import Peers
from confidantd.jobs.pipeline import PipelineRouter
from confidantd.jobs.programs import Programs
from confidantd.jobs.quantising import Quantiser
from confidantd.jobs.record import JobLog
from confidantd.planner.plan import Plan
from confidantd.store.blobs import BlobStore
from confidantd.store.model_index import ModelIndex
from confidantd.swarm.state import CoordinatorView, PeerView
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.jobs import PlanRequest

PLAN_SECONDS = 60.0
COORDINATOR_SECONDS = 10.0  # an election takes less than five


class SwarmView(Protocol):
    """What jobs need to know of the swarm."""

    def peers(self) -> tuple[PeerView, ...]: ...

    def conflict(self) -> str | None: ...

    async def wait_for_coordinator(self, timeout_seconds: float) -> CoordinatorView: ...


@dataclass(frozen=True, slots=True)
class JobServices:
    """What a job uses of this device."""

    self_id: DeviceId
    home: Path
    peers: Peers
    swarm: SwarmView
    store: BlobStore
    index: ModelIndex
    programs: Programs
    quantiser: Quantiser
    importer: Importer
    router: PipelineRouter
    open_api: Callable[[], Awaitable[str]]  # for clients of served models; gives its URL


async def ask_coordinator(services: JobServices, method: str, request: PlanRequest) -> Plan:
    """A plan from the coordinator: `job.plan` only looks, `job.negotiate` reserves."""
    conflict = services.swarm.conflict()
    if conflict is not None:
        raise IdentityConflictError(conflict)
    coordinator = await services.swarm.wait_for_coordinator(COORDINATOR_SECONDS)
    answer = await services.peers.request(
        coordinator.id, method, to_map(request), timeout_seconds=PLAN_SECONDS
    )
    return from_map(Plan, answer)


def emit_progress(log: JobLog, phase: str, done: int, of: int, detail: str = "") -> None:
    """One `progress` event."""
    log.emit({"event": "progress", "phase": phase, "done": done, "of": of, "detail": detail})


def failure_event(failure: Any) -> dict[str, Any]:
    """The `failed` event of an error."""
    return {"event": "failed", **failure.to_wire()}
