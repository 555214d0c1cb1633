"""What the programs of a unit save: as much as the memory model says, and nothing by weight."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest

from confidantd.models.manifest import MANIFEST_KEY
from confidantd.models.saved import saved_floats
from confidantd.models.spec import LoraSpec, ModelSpec, ProgramRequest
from tests.component.engine_models import ROWS, TOKENS, save_model
from tests.programs import programs_for

# Most requests are those of other tests, so that they are compiled once.
CASES = {
    "llama, full": None,
    "gpt2, full": None,
    "llama, lora": LoraSpec(4, 10.0, ("q_proj", "o_proj", "up_proj")),
    "gpt2, lora": LoraSpec(4, 10.0, ("c_attn", "c_proj")),
    "llama, lora without output": LoraSpec(2, 4.0, ("q_proj", "down_proj")),
}
PRODUCTS = ("MatMul", "Gemm")


def compiled(spec: ModelSpec, lora: LoraSpec | None) -> dict[str, Path]:
    """The programs of a training job."""
    method = "full" if lora is None else "lora"
    return programs_for(ProgramRequest(spec, "train", method, lora, ROWS, TOKENS))


def ports(path: Path, side: str) -> list[dict[str, Any]]:
    """Inputs or outputs as the manifest lists them."""
    entries = {e.key: e.value for e in onnx.load(path).metadata_props}
    found: list[dict[str, Any]] = json.loads(entries[MANIFEST_KEY])[side]
    return found


def products(path: Path) -> int:
    """How many matrix products a program computes."""
    return sum(node.op_type in PRODUCTS for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("case", CASES)
def test_a_block_saves_what_the_memory_model_says(tmp_path: Path, case: str) -> None:
    spec = save_model(case.partition(",")[0], tmp_path).spec
    programs = compiled(spec, CASES[case])
    outputs = ports(programs["block_forward"], "outputs")
    saved = [port for port in outputs if port["role"] == "saved"]
    assert sum(math.prod(port["shape"]) for port in saved) == saved_floats(
        spec, CASES[case], ROWS, TOKENS
    )


@pytest.mark.parametrize("case", CASES)
def test_the_backward_takes_all_that_is_saved_and_computes_no_product_twice(
    tmp_path: Path, case: str
) -> None:
    spec = save_model(case.partition(",")[0], tmp_path).spec
    programs = compiled(spec, CASES[case])
    saved = [p for p in ports(programs["block_forward"], "outputs") if p["role"] == "saved"]
    held = [p for p in ports(programs["block_recompute"], "inputs") if p["role"] == "saved"]
    (middle,) = held
    assert middle["shape"] == [ROWS * TOKENS, spec.block.hidden]
    again = ports(programs["block_recompute"], "outputs")
    assert sorted([middle, *again], key=saved.index) == saved
    taken = [p for p in ports(programs["block_backward"], "inputs") if p["role"] == "saved"]
    assert taken == saved
    forward, recompute = products(programs["block_forward"]), products(programs["block_recompute"])
    assert recompute <= forward - 2  # neither the output projection nor the last product
    if CASES[case] is None:  # each product has two gradients
        assert products(programs["block_backward"]) == 2 * forward
