"""`--quantise`: made once by the owner, sent in shares, the same text however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.devices import Device, swarm
from tests.e2e.small_models import Small, copy_model, make_small
from tests.e2e.test_bad_input import one_line

NAMES = ("anna", "ben")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    with swarm(tmp_path_factory.mktemp("quantised"), len(NAMES)) as found:
        yield found


@pytest.fixture(scope="module", params=["stories260K", "gpt2"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(request.param, tmp_path_factory.mktemp(request.param))


def generate(device: Device, small: Small, *options: str) -> dict[str, Any]:
    """The answer."""
    return device.json(
        "generate", str(small.folder), "--prompt", small.prompt,
        "--max-new-tokens", "12", *options,
    )  # fmt: skip


def made(device: Device) -> dict[str, int]:
    """When each quantised matrix was written."""
    return {
        file.name: file.stat().st_mtime_ns
        for file in (device.home / "store" / "quantised").glob("*.json")
    }


@pytest.mark.parametrize("form", ["int8", "int4:16"])
def test_one_device_and_two_say_the_same(devices: list[Device], small: Small, form: str) -> None:
    """The second device fetches its share; the owner quantises only once."""
    before = made(devices[0])
    first = generate(devices[0], small, "--quantise", form, "--devices", "anna")
    there = made(devices[0])
    assert len(there) > len(before)
    both = generate(devices[0], small, "--quantise", form, "--devices", "anna,ben")
    assert both["tokens"] == first["tokens"]
    assert len(both["stages"]) == len(NAMES)
    assert made(devices[0]) == there
    assert not made(devices[1])
    plain = generate(devices[0], small, "--devices", "anna")
    memory, plain_memory = (
        sum(stage["memory_bytes"] for stage in answer["stages"]) for answer in (first, plain)
    )
    assert memory < plain_memory


def test_a_format_that_there_is_not_is_one_line(devices: list[Device], small: Small) -> None:
    done = devices[0].cli(
        "generate", str(small.folder), "--prompt", small.prompt, "--quantise", "int5"
    )
    line = one_line(done)
    assert "int5" in line
    assert "int8 or int4" in line


def test_a_model_that_cannot_be_quantised_is_one_line(
    devices: list[Device], small: Small, tmp_path: Path
) -> None:
    """A weight that is no number would poison its block."""
    folder = copy_model(small.folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("q_proj.weight", "c_attn.weight")))
    weights[name][1, 2] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = devices[0].cli(
        "generate", str(folder), "--prompt", small.prompt, "--quantise", "int8",
        "--devices", "anna",
    )  # fmt: skip
    assert "not finite" in one_line(done)
