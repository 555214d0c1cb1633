"""The picture of a step: one row a stage, what is computed in proportion to its time."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from confidantd.cli.timeline import COLOURS, draw
from confidantd.errors import UsageError
from confidantd.jobs.timeline import timeline
from tests.unit.planner_support import device, make_plan, workload

SVG = "{http://www.w3.org/2000/svg}"


def planned(method: Any = "full") -> dict[str, Any]:
    """A plan over three devices as the daemon prints it."""
    devices = [device(name) for name in ("anna", "ben <b>", "carl")]
    return make_plan(workload(method=method), devices, devices[0].id, use_all=True).to_json()


def rects(picture: str, kind: str) -> list[float]:
    """Widths of what was drawn of a kind."""
    root = ET.fromstring(picture)
    found = [r for r in root.iter(f"{SVG}rect") if r.get("fill") == COLOURS[kind]]
    return [float(r.get("width", "0")) for r in found]


def test_the_predicted_step_is_drawn() -> None:
    plan = planned()
    picture = draw(timeline(plan, None))
    texts = "".join(ET.fromstring(picture).itertext())
    assert "predicted" in texts
    assert "measured" not in texts
    assert "ben <b>" in texts
    forwards = rects(picture, "forward")[:-1]  # the last one is the legend's
    assert len(forwards) == 3 * plan["microbatches"]
    forward = sum(stage["forward_seconds"] for stage in plan["stages"])
    backward = sum(stage["seconds"] for stage in plan["stages"]) - forward
    drawn = sum(rects(picture, "backward")[:-1]) / sum(forwards)
    assert drawn == pytest.approx(backward / forward, rel=0.01)
    assert len(rects(picture, "step")[:-1]) == 3


def test_what_was_measured_is_drawn_below_on_the_same_scale() -> None:
    plan = planned()
    longest = max(span["end"] for row in timeline(plan, None)["predicted"] for span in row)
    rows = [
        [{"kind": "forward", "microbatch": 0, "start": 0.0, "end": 2 * longest}] for _ in range(3)
    ]
    picture = draw(timeline(plan, {"timeline": rows}))
    assert "measured" in "".join(ET.fromstring(picture).itertext())
    widths = rects(picture, "forward")[:-1]
    assert len(widths) == 3 * plan["microbatches"] + 3
    assert max(widths) == pytest.approx(790, abs=1)  # the whole chart
    assert max(widths) > 4 * min(widths)


def test_generation_has_no_steps() -> None:
    with pytest.raises(UsageError, match="only a training job has steps"):
        timeline(planned(None), None)
