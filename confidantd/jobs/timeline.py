"""What a picture of a job's step is drawn from: the planned step, and the last measured one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from confidantd.errors import UsageError
from confidantd.planner.simulate import LinkCost, StageCost, holders_of, simulate


def timeline(plan: Mapping[str, Any], done: Mapping[str, Any] | None) -> dict[str, Any]:
    """Names of the stages, and what each computes when, from the events `plan` and `done`."""
    if plan["objective"] != "train":
        raise UsageError("only a training job has steps to draw")
    return {
        "names": [stage["name"] for stage in plan["stages"]],
        "predicted": _predicted(plan),
        "measured": None if done is None else done.get("timeline"),
    }


def _predicted(plan: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Spans of each stage, as the planner simulates the step."""
    stages = [
        StageCost(
            s["forward_seconds"],
            s["seconds"] - s["forward_seconds"],
            s.get("update_seconds", 0.0),
        )
        for s in plan["stages"]
    ]
    links = [
        LinkCost(k["sending_seconds"], k["seconds"] - k["sending_seconds"]) for k in plan["links"]
    ]
    holders = holders_of([stage["device"] for stage in plan["stages"]])
    rows: list[list[dict[str, Any]]] = [[] for _ in stages]
    for span in simulate(stages, links, plan["microbatches"], holders=holders).spans:
        if span.end > span.start:
            bar = {"kind": span.kind.value, "microbatch": span.microbatch}
            rows[span.stage].append({**bar, "start": span.start, "end": span.end})
    return rows
