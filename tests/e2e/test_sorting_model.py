"""A model with exact answers: a GPT-2 that sorts six letters, over two devices."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests import reference
from tests.e2e.devices import swarm

SAMPLE = 60  # every 60th of the 729 inputs; each starts a pipeline of its own


def test_letters_come_out_sorted(tmp_path: Path) -> None:
    model = reference.MODELS / "gpt-nano-sort"
    if not model.is_dir():
        pytest.skip("the sorting model is not on this machine")
    inputs = ["".join(letters) for letters in itertools.product("ABC", repeat=6)][::SAMPLE]
    with swarm(tmp_path, 2) as devices:
        for letters in inputs:
            answer = devices[0].json(
                "generate", str(model), "--prompt", letters, "--max-new-tokens", "6",
                "--devices", "anna,ben",
            )  # fmt: skip
            assert answer["text"] == "".join(sorted(letters)), letters
