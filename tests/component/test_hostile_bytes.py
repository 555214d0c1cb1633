"""Whatever others send or write: it is refused in one clear error, or it is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confidantd.errors import ProtocolError
from confidantd.wire.codec import from_map, to_map
from tests.fuzz.examples import example
from tests.fuzz.runner import attempt, fuzz, hangs_end
from tests.fuzz.targets import QUESTIONS, Target, targets

INPUTS = 700  # of each target: over 10,000 in all; `python -m benchmarks.fuzz` tries a million
FOUND = Path(__file__).resolve().parents[1] / "fuzz" / "found"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    """All targets by name."""
    folder = tmp_path_factory.mktemp("fuzz")
    with hangs_end():
        yield {target.name: target for target in targets(folder)}


NAMES = (
    "frames", "control messages", "greetings", "what messages ask", "worker messages", "pairing",
    "rosters", "mDNS records", "programs", "manifests", "safetensors headers", "GGUF headers",
    "model configs", "what-if files", "config files", "lists of members", "training text",
)  # fmt: skip


def test_every_target_is_tried(every: dict[str, Target]) -> None:
    assert set(every) == set(NAMES)
    assert len(NAMES) * INPUTS >= 10_000


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_a_clear_error_comes_of_hostile_bytes(
    every: dict[str, Target], name: str
) -> None:
    target = every[name]
    for seed in target.seeds:
        assert attempt(target, seed) is None, "what it begins from is right"
    outcome = fuzz(target, INPUTS, seed=1)
    assert outcome.findings == []
    assert outcome.inputs == INPUTS
    assert outcome.accepted < INPUTS  # the inputs are hostile


FILES = [pytest.param(path, id=path.stem) for path in sorted(FOUND.glob("*.bin"))]


@pytest.mark.parametrize("file", FILES)
def test_what_was_found_once_stays_mended(every: dict[str, Target], file: Path) -> None:
    target = every[file.stem.partition("--")[0].replace("_", " ")]
    assert not attempt(target, file.read_bytes())


@pytest.mark.parametrize("kind", QUESTIONS, ids=lambda kind: kind.__name__)
@settings(deadline=None)
@given(data=st.data())
def test_a_message_with_any_values_is_read_or_refused(kind: type[Any], data: st.DataObject) -> None:
    right = to_map(example(kind))
    name = data.draw(st.sampled_from(sorted(right)))
    value = data.draw(VALUES)
    try:
        found = from_map(kind, {**right, name: value})
    except ProtocolError:
        return
    assert to_map(found).keys() == right.keys()
