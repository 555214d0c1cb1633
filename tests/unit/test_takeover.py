"""Who takes over from devices that are lost, and which weights lie ready for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from confidantd.ids import DeviceId
from confidantd.jobs.moving import takeover
from confidantd.jobs.spares import NEIGHBOURS, wanted_spares
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.planner.plan import StagePlan
from tests.unit.model_files import LLAMA

A, B, C, D = (DeviceId(letter * 64) for letter in "abcd")


def stage(device: DeviceId, first: int, past_last: int, layers: int = 8) -> StagePlan:
    """Of a model with so many layers."""
    return StagePlan(
        device, device[:1], first, past_last, embedding=first == 0, head=past_last == layers,
        memory_bytes=0, available_bytes=0, seconds=0.0, heads=1, columns=1,
    )  # fmt: skip


FOUR = [stage(A, 0, 2), stage(B, 2, 4), stage(C, 4, 5), stage(D, 5, 8)]


@pytest.mark.parametrize(
    ("away", "expected"),
    [
        ((), ((A, 2), (B, 2), (C, 1), (D, 3))),
        ((1,), ((A, 4), (C, 1), (D, 3))),
        ((2, 3), ((A, 2), (B, 6))),
        ((1, 3), ((A, 4), (C, 4))),
        ((0,), ((B, 4), (C, 1), (D, 3))),
        ((0, 1, 2, 3), ()),
    ],
)
def test_layers_go_to_the_stage_before(
    away: tuple[int, ...], expected: tuple[tuple[DeviceId, int], ...]
) -> None:
    assert takeover(FOUR, away) == expected


def test_a_ring_is_planned_anew() -> None:
    ring = [stage(A, 0, 2), stage(B, 2, 8, layers=9), stage(A, 8, 8)]
    assert takeover(ring, ()) == ()
    ends = [replace(stage(A, 0, 0), embedding=True), stage(B, 0, 8)]
    assert takeover(ends, ()) == (), "a stage without layers cannot be asked for by layers"


def test_spares_are_what_is_behind() -> None:
    model = replace(spec_from_config(Config(dict(LLAMA), "config.json")), layers=8)
    spares = wanted_spares(model, FOUR)
    assert {index: list(found) for index, found in spares.items()} == {
        0: [1, 2], 1: [2, 3], 2: [3], 3: [],
    }  # fmt: skip
    assert NEIGHBOURS == 2
    assert all(".layers.4." in name for name in spares[1][2])
    assert any("norm" in name and ".layers." not in name for name in spares[2][3]), "the head"
