"""The compiler process: the same bytes every time, readable by old runtimes, clear errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from confidantd.ids import digest_of
from confidantd.models.programs import program_names
from confidantd.models.spec import LoraSpec, ProgramRequest
from tests.component.engine_models import ROWS, TOKENS, save_model
from tests.programs import compile_into, programs_for


def requests(kind: str, folder: Path) -> list[ProgramRequest]:
    """The requests that other tests use too, so that they are compiled once."""
    spec = save_model(kind, folder).spec
    targets = ("q_proj", "o_proj", "up_proj") if kind == "llama" else ("c_attn", "c_proj")
    return [
        ProgramRequest(spec, "train", "full", None, ROWS, TOKENS),
        ProgramRequest(spec, "train", "lora", LoraSpec(4, 10.0, targets), ROWS, TOKENS),
        ProgramRequest(spec, "generate"),
        ProgramRequest(spec, "generate", split=True),
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_programs_are_plain_onnx_without_traces_of_this_machine(tmp_path: Path, kind: str) -> None:
    """Opset and IR of the oldest worker runtime, no custom domain, no path, roles inside."""
    for request in requests(kind, tmp_path / "model"):
        programs = programs_for(request)
        assert set(programs) == set(program_names(request))
        for name, path in programs.items():
            data = path.read_bytes()
            assert b".py" not in data
            assert str(Path.home()).encode() not in data
            model: Any = onnx.load_from_string(data)
            assert model.ir_version <= 10
            assert [(o.domain, o.version <= 20) for o in model.opset_import] == [("", True)]
            manifest = json.loads({p.key: p.value for p in model.metadata_props}.popitem()[1])
            assert manifest["program"] == name
            assert [port["name"] for port in manifest["inputs"]] == [
                value.name for value in model.graph.input
            ]
            assert all(port["role"] and port["dtype"] for port in manifest["outputs"])


def test_same_request_gives_same_bytes(tmp_path: Path) -> None:
    """Two processes, and a model that differs only in what programs do not depend on."""
    spec = save_model("llama-tied", tmp_path / "model").spec
    more = dataclasses.replace(spec, layers=7, end_tokens=(3,), tied=False, max_positions=9999)
    first = programs_for(ProgramRequest(spec, "generate"))
    second = compile_into(ProgramRequest(more, "generate"), tmp_path / "out")
    assert {n: digest_of(p.read_bytes()) for n, p in first.items()} == {
        n: digest_of(p.read_bytes()) for n, p in second.items()
    }


def test_listing_and_progress(tmp_path: Path) -> None:
    """programs.json tells file, digest and size of each program; stdout counts them."""
    spec = save_model("gpt2", tmp_path / "model").spec
    request = ProgramRequest(spec, "generate")
    folder = programs_for(request)["block_decode"].parent
    listed = json.loads((folder / "programs.json").read_text())["programs"]
    assert tuple(listed) == program_names(request)
    for entry in listed.values():
        data = (folder / entry["file"]).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (digest_of(data), len(data))


@pytest.mark.parametrize("content", ["{", '{"model": 1, "purpose": "train"}', "[]"])
def test_senseless_request_is_one_error_line(tmp_path: Path, content: str) -> None:
    """Exit status 1 and an error as the daemon passes it on."""
    question = tmp_path / "request.json"
    question.write_text(content)
    command = [sys.executable, "-m", "confidantd.compiler", str(question), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert set(json.loads(done.stdout)["error"]) == {"code", "message", "hint"}
    assert done.stderr == ""
