"""Sizes that peers ask plans for, or offer, are bounded before anything is computed from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from confidantd.errors import ProtocolError
from confidantd.ids import DeviceId, Digest, JobId
from confidantd.jobs.moving import handed_over
from confidantd.jobs.request_checks import check_offer, check_request
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.wire.jobs import CurrentStage, Offer, PlanRequest
from confidantd.wire.worker import StateBlob, StateTensor
from tests.unit.model_files import LLAMA

MODEL = spec_from_config(Config(dict(LLAMA), "config.json"))
A, STORED = DeviceId("a" * 64), Digest("d")
REQUEST = PlanRequest(
    job=JobId("j"), epoch=1, model_name="m", model=MODEL, objective="train", method="full",
    lora=None, batch_size=8, microbatches=4, sequence_length=64,
)  # fmt: skip
OFFER = Offer(
    job=JobId("j"), epoch=1, term=1, owner=A, stage=0, stages=2, first_layer=0,
    past_last_layer=1, memory_bytes=1,
)  # fmt: skip


def stages(*layers: int, memory_bytes: int = 1) -> tuple[CurrentStage, ...]:
    """Of a running job."""
    return tuple(CurrentStage(A, count, "saved", memory_bytes) for count in layers)


def test_what_is_meant_passes() -> None:
    check_request(REQUEST)
    check_request(replace(REQUEST, microbatches=0, current=stages(MODEL.layers)))
    check_offer(OFFER)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": 1 << 40},
        {"microbatches": 9},
        {"sequence_length": 1 << 40},
        {"load": -1},
        {"devices": ("a",) * 513},
        {"current": stages(10**12)},
        {"current": stages(-1, MODEL.layers + 1)},
        {"current": stages(MODEL.layers, memory_bytes=-1)},
        {"model": replace(MODEL, layers=10**9)},
    ],
)
def test_a_request_with_impossible_sizes_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        check_request(replace(REQUEST, **wrong))


@pytest.mark.parametrize(
    "wrong",
    [{"memory_bytes": -1}, {"stage": 2}, {"stages": 1000, "stage": 999}, {"first_layer": 2}],
)
def test_an_offer_with_impossible_sizes_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        check_offer(replace(OFFER, **wrong))


def blob(*tensors: tuple[str, int], digest: Digest | None = STORED) -> StateBlob:
    """As a stage hands it over."""
    return StateBlob(tuple(StateTensor(name, size) for name, size in tensors), "", digest)


def test_a_stage_must_hand_over_what_it_was_asked_for() -> None:
    given = (blob(("w", 4), ("b", 2)), blob(("v", 1)))
    found = handed_over(given, {"w": 4, "b": 2, "v": 1}, A)
    assert {name: (e.size, e.bytes, e.offset) for name, e in found.items()} == {
        "w": (4, 72, 0), "b": (2, 72, 48), "v": (1, 12, 0),
    }  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        (),
        (blob(("w", 4), ("other", 4)),),
        (blob(("w", 5)),),
        (blob(("w", 4), ("w", 4)),),
        (blob(("w", 4)), blob(("w", 4))),
        (blob(("w", 4), digest=None),),
    ],
)
def test_anything_else_is_refused(given: tuple[StateBlob, ...]) -> None:
    with pytest.raises(ProtocolError, match="handed over"):
        handed_over(given, {"w": 4}, A)
