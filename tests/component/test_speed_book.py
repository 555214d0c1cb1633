"""What running stages teach a device of its speed, in real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from confidantd.ids import DeviceId, JobId
from confidantd.jobs.speed_book import SpeedBook
from confidantd.jobs.splits import Splits, program_request
from confidantd.models.families import spec_from_config
from confidantd.models.spec import ModelSpec
from confidantd.wire.speeds import Speeds
from confidantd.wire.stage import StageAssignment, StageSpec
from confidantd.wire.worker import StepDone, StepSpan
from tests.unit.model_files import LLAMA, Config

KNOWN = Speeds(forward=1.0, backward=2.0, forward_again=1.0, backward_again=3.0, message=0.25)


def a_book(folder: Path) -> SpeedBook:
    return SpeedBook(folder, Splits(folder, 1, "never", tuple))


def llama() -> ModelSpec:
    return spec_from_config(Config(LLAMA, "config.json"))


def middle_stage() -> StageAssignment:
    """One layer between two other stages: two messages in each pass."""
    spec = StageSpec(llama(), 1, 2, False, False, "full")
    return StageAssignment(JobId("job"), 0, 1, 3, 1, spec, DeviceId("a" * 64), {}, ())


def step(seconds: float, wall_seconds: float) -> StepDone:
    """A step of one microbatch, in which the stage computed for `seconds`."""
    spans = (
        StepSpan("forward", 0, 0.0, seconds / 3),
        StepSpan("backward", 0, wall_seconds - seconds * 2 / 3, wall_seconds),
    )
    return StepDone(1, None, None, seconds, wall_seconds, 0, spans=spans)


@pytest.mark.parametrize(
    ("seconds", "wall_seconds", "why"),
    [
        (4.0, 4.0, "every message passed while it computed, and took its part of that"),
        (3.2, 16.0, "a fifth of them did"),
    ],
)
def test_messages_are_not_taken_for_slow_blocks(
    tmp_path: Path, seconds: float, wall_seconds: float, why: str
) -> None:
    book, place = a_book(tmp_path), middle_stage()
    book.remember(program_request(place.spec), KNOWN)
    book.begin(place)
    for _ in range(10):
        book.observe(place, step(seconds, wall_seconds))
    found = book.known(program_request(place.spec))
    assert found is not None
    assert found.forward == pytest.approx(KNOWN.forward), why
    assert found.message == pytest.approx(KNOWN.message), why


def test_a_stage_that_is_slower_than_measured_is_believed_and_kept(tmp_path: Path) -> None:
    book, place = a_book(tmp_path), middle_stage()
    request = program_request(place.spec)
    book.remember(request, KNOWN)
    book.begin(place)
    book.observe(place, step(8.0, 8.0))
    book.save(place)
    found = a_book(tmp_path).known(request)
    assert found is not None
    assert (found.forward, found.backward, found.message) == pytest.approx((2.0, 4.0, 0.5))


def test_what_an_older_release_measured_is_measured_again(tmp_path: Path) -> None:
    book, request = a_book(tmp_path), program_request(middle_stage().spec)
    book.remember(request, KNOWN)
    (file,) = (path for path in tmp_path.iterdir() if path.suffix == ".json")
    assert book.known(request) == KNOWN
    content = json.loads(file.read_text())
    del content["format"]
    file.write_text(json.dumps(content))
    assert book.known(request) is None
