"""What a device measures of blocks: every part, by the process that daemons start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from confidantd.identity.certificate import (
    CERTIFICATE_NAME,
    IDENTITY_FOLDER,
    KEY_NAME,
    load_or_create,
)
from confidantd.identity.create import create_identity
from confidantd.models.spec import LoraSpec, ProgramRequest
from confidantd.planner.speeds import valid
from confidantd.wire.codec import from_map, to_map
from confidantd.wire.speeds import Speeds
from tests.component.engine_models import ROWS, TOKENS, save_model
from tests.programs import programs_for

pytestmark = pytest.mark.alone

LORA = LoraSpec(4, 8.0, ("q_proj", "v_proj"))


def measure(folder: Path, request: ProgramRequest, **fields: Any) -> subprocess.CompletedProcess:
    """Run the process on a request, on one processor; its answer is in `folder`."""
    home = folder / "home"
    create_identity(home / IDENTITY_FOLDER, KEY_NAME, CERTIFICATE_NAME)
    programs = {name: str(path) for name, path in programs_for(request).items()}
    question = {
        "request": to_map(request), "programs": programs, "threads": 1, "ends": True,
        "home": str(home), "device": load_or_create(home).device_id,
    }  # fmt: skip
    (folder / "question").write_text(json.dumps(question | fields))
    module = "confidantd.worker.measure"
    command = [sys.executable, "-m", module, str(folder / "question"), str(folder / "answer")]
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        os.sched_setaffinity(0, processors)


def answer(folder: Path) -> Speeds:
    """What was measured."""
    return from_map(Speeds, json.loads((folder / "answer").read_text()))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_part_of_a_training_step_is_measured(tmp_path: Path, method: Any) -> None:
    model = save_model("llama", tmp_path).spec
    lora = LORA if method == "lora" else None
    done = measure(tmp_path, ProgramRequest.of(model, method, lora, ROWS, TOKENS))
    assert done.returncode == 0, done.stderr
    found = answer(tmp_path)
    assert valid(found)
    measured = (
        found.backward, found.forward_again, found.backward_again, found.update, found.message
    )  # fmt: skip
    assert min(measured) > 0
    assert found.head is not None
    assert found.head > 0
    assert (found.embedding > 0) == (method == "full")
    progress = [json.loads(line) for line in done.stdout.splitlines()]
    assert [p["done"] for p in progress] == [0, 1, 2, 3, 4, 5]


def test_a_token_is_measured_for_generation(tmp_path: Path) -> None:
    model = save_model("gpt2", tmp_path).spec
    done = measure(tmp_path, ProgramRequest.of(model, None, None, 1, 1), ends=False)
    assert done.returncode == 0, done.stderr
    found = answer(tmp_path)
    assert valid(found)
    assert (found.backward, found.head) == (0.0, None)  # the ends did not fit


def test_programs_that_are_none_are_one_error_line(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path).spec
    (tmp_path / "wrong").write_bytes(b"no program")
    request = ProgramRequest.of(model, "full", None, ROWS, TOKENS)
    wrong = {name: str(tmp_path / "wrong") for name in programs_for(request)}
    done = measure(tmp_path, request, programs=wrong)
    assert done.returncode == 1
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert "wrong" in error["message"]
    assert "Traceback" not in done.stderr
