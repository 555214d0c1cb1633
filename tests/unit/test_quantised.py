"""Weights in blocks of 4 and 8 bits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from confidantd.engine.quantised import Quantised, quantise, quantised_from_file
from confidantd.errors import CorruptFileError, ModelError, UsageError
from confidantd.models.block_format import BlockFormat
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.quantisation import (
    block_bytes,
    formats_of,
    head_bytes,
    quantised_matrices,
    quantised_spec,
)
from confidantd.models.spec import ModelSpec
from confidantd.models.tensors import block_parameters
from tests.unit.model_files import GPT2, LLAMA


def spec_of(config: dict[str, object]) -> ModelSpec:
    return spec_from_config(Config(config, "config.json"))


FORMATS = [BlockFormat(bits, block) for bits in (4, 8) for block in (16, 32, 128)]


def matrix(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("width", [16, 32, 100, 129])
def test_every_weight_is_within_a_step_of_its_block(form: BlockFormat, width: int) -> None:
    """Half a step, but for those that are cut off in 4 bits; rows need not be whole blocks."""
    weights = matrix(9, width)
    found = quantise(weights, form)
    steps = np.repeat(np.abs(found.scales.astype(np.float32)), form.block, 1)[:, :width]
    errors = np.abs(found.values() - weights) / steps
    assert errors.max() <= (0.51 if form.bits == 8 else 2.0)
    assert np.sort(errors.reshape(-1))[int(0.9 * errors.size)] <= 0.51


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_is_stored_has_the_size_that_is_planned_for(form: BlockFormat, tmp_path: Path) -> None:
    """And comes back from a file as it was, wherever it lies in it."""
    found = quantise(matrix(7, 90), form)
    data = found.to_bytes()
    assert len(data) == form.size((7, 90))
    file = tmp_path / "tensor"
    file.write_bytes(b"12345" + data)
    again = quantised_from_file(file, 5, form, (7, 90))
    assert np.array_equal(again.values(), found.values())
    file.write_bytes(data[:-1])
    with pytest.raises(CorruptFileError, match="shorter"):
        quantised_from_file(file, 0, form, (7, 90))
    for shape in ((7,), (7, 0), (-7, 90), (7, 9, 10)):
        with pytest.raises(ModelError, match="matrix"):
            quantised_from_file(file, 0, form, shape)


def test_four_bits_of_known_numbers() -> None:
    """The first number of a byte is its lower half; what is stored is 8 more."""
    weights = np.zeros((1, 16), np.float32)
    weights[0, :4] = [-8, 7, 1, -1]
    found = quantise(weights, BlockFormat(4, 16))
    assert found.scales.tolist() == [[1.0]]
    assert found.numbers[0, 0, :3].tolist() == [0xF0, 0x79, 0x88]
    assert np.array_equal(found.values(), weights)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_zeros_and_large_matrices(form: BlockFormat) -> None:
    """Zeros stay zeros; rows are quantised alike whatever stands beside them."""
    assert not quantise(np.zeros((2, 40), np.float32), form).values().any()
    tall = matrix(40_000, 32, seed=3)
    assert np.array_equal(
        quantise(tall, form).values()[39_990:], quantise(tall[39_990:], form).values()
    )


def test_a_choice_names_bits_and_block() -> None:
    spec = spec_of(LLAMA)
    assert quantised_spec(spec, "none") is spec
    assert set(formats_of(quantised_spec(spec, "int4"))) == {*"qkvo", "gate", "up", "down", "head"}
    assert formats_of(quantised_spec(spec, "int4"))["q"] == BlockFormat(4, 32)
    assert formats_of(quantised_spec(spec, "int8:128"))["head"] == BlockFormat(8, 128)
    assert not formats_of(spec)
    for wrong in ("int5", "int4:7", "INT4", "", "none:32", "int4:32:1", "int4:32+"):
        with pytest.raises(UsageError, match="cannot be quantised"):
            quantised_spec(spec, wrong)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_sizes_of_the_parts_are_those_of_their_matrices(
    config: dict[str, object], tied: bool
) -> None:
    """The head is quantised apart from a table that it shares, in 8 bits."""
    spec = quantised_spec(spec_of(config), "int4:16")
    assert not spec.tied
    *matrices, head = quantised_matrices(spec, tied=tied)
    assert len({matrix.name for matrix in matrices}) == len(matrices)
    assert head.format == BlockFormat(8, 16)
    assert (head.stored == head.name) != tied
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    others = spec.layers * block_parameters(spec) - weights
    sizes = sum(matrix.format.memory(matrix.shape) for matrix in matrices)
    assert spec.layers * block_bytes(spec) == sizes + 4 * others
    norms = spec.block.hidden * (2 if spec.block.norm == "layer" else 1)
    twice = math.prod(head.format.packed_shape(head.shape))
    assert head_bytes(spec) == head.format.memory(head.shape) + twice + 4 * norms


def test_formats_of_strangers_are_none() -> None:
    """What is no name of a format is a plain dtype."""
    for name in ("F32", "INT4", "INT4:33", "INT4:32x", "int4:32", "INT16:32", ""):
        assert BlockFormat.parse(name) is None
    assert BlockFormat.parse("INT8:64") == BlockFormat(8, 64)


def test_memory_is_used_as_it_lies() -> None:
    data = np.frombuffer(quantise(matrix(4, 32), BlockFormat(8, 32)).to_bytes(), np.uint8)
    found = Quantised.of_bytes(BlockFormat(8, 32), (4, 32), data)
    assert np.shares_memory(found.numbers, data)
    assert np.shares_memory(found.scales, data)
