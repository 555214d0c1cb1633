"""GGUF files: what their headers say, and one clear line for everything that is wrong."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import (
    ConfidantError,
    CorruptFileError,
    MissingTensorError,
    ModelError,
    UnsupportedArchitectureError,
)
from confidantd.models.block_format import BlockFormat
from confidantd.models.config import Config
from confidantd.models.families import spec_from_config
from confidantd.models.folder import read_model
from confidantd.models.gguf import read_gguf
from confidantd.models.gguf_format import BY_NAME, GgufFormat
from confidantd.models.gguf_model import config_of, places_of
from confidantd.models.imported import INDEX, identity
from confidantd.models.quantisation import (
    block_bytes,
    embedding_bytes,
    formats_of,
    head_bytes,
    own_formats,
    own_spec,
)
from confidantd.models.rope import rope_frequencies
from confidantd.models.spec import ModelSpec, RopeSpec
from confidantd.models.tensors import stage_tensor_names
from tests.unit.gguf_bytes import F32, LAYERS, Q8_0, SETTINGS, VOCABULARY, content, tensors_of, text


def write(folder: Path, settings: dict[str, Any] | None = None, **kinds: int) -> Path:
    """A model's file."""
    file = folder / "model.gguf"
    file.write_bytes(content({**SETTINGS, **(settings or {})}, tensors_of(**kinds)))
    return file


def spec_of(file: Path) -> ModelSpec:
    """The model in a file."""
    return spec_from_config(Config(config_of(read_gguf(file)), "config.json"))


def test_a_header_becomes_a_config(tmp_path: Path) -> None:
    config = config_of(read_gguf(write(tmp_path)))
    spec = spec_from_config(Config(config, "config.json"))
    assert (spec.family, spec.layers, spec.vocabulary) == ("llama", LAYERS, VOCABULARY)
    assert (spec.block.heads, spec.block.kv_heads, spec.block.head_dim) == (4, 2, 16)
    assert (spec.block.columns, spec.max_positions, spec.tied) == (96, 128, False)
    assert spec.block.rope == RopeSpec(10000.0)
    assert config["eos_token_id"] == [2]


def test_every_tensor_has_its_place(tmp_path: Path) -> None:
    """By the names that the model needs; rows of queries and keys are interleaved by heads."""
    header = read_gguf(write(tmp_path))
    places = places_of(header, config_of(header))
    spec = spec_of(tmp_path / "model.gguf")
    assert set(places) == set(stage_tensor_names(spec, 0, LAYERS, embedding=True, head=True))
    assert places["model.layers.1.self_attn.q_proj.weight"]["dtype"] == "GGUF:Q8_0:4"
    assert places["model.layers.1.self_attn.k_proj.weight"]["dtype"] == "GGUF:Q8_0:2"
    assert places["model.layers.1.self_attn.v_proj.weight"]["dtype"] == "GGUF:Q8_0"
    assert places["model.norm.weight"]["dtype"] == "F32"
    for name, place in places.items():
        assert place["offset"] % 32 == 0, name
    ends = [place["offset"] + place["bytes"] for place in places.values()]
    assert max(ends) == (tmp_path / "model.gguf").stat().st_size


def test_a_folder_with_an_index_is_a_model(tmp_path: Path) -> None:
    """As long as its file stays what it was."""
    file, folder = write(tmp_path), tmp_path / "folder"
    header = read_gguf(file)
    config = config_of(header)
    index = {"source": identity(file), "tensors": places_of(header, config)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps(index))
    model = read_model(folder)
    assert (model.source, model.path) == (file, folder)
    assert model.tensors["lm_head.weight"].file == file
    assert set(model.formats.split()) == {
        f"{kind}=INT8:32"
        for kind in ("q", "k", "v", "o", "gate", "up", "down", "head", "embedding")
    }
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(CorruptFileError, match="has changed"):
        read_model(folder)
    (folder / INDEX).write_text('{"tensors": []}')
    with pytest.raises(CorruptFileError, match="not valid"):
        read_model(folder)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "linear"),
        ({"llama.rope.scaling.type": "none"}, "default"),
        ({"llama.expert_count": 0}, "default"),
        ({"llama.attention.head_count_kv": [2, 2]}, "default"),
    ],
)
def test_settings_that_are_read(tmp_path: Path, settings: dict[str, Any], wanted: str) -> None:
    rope = spec_of(write(tmp_path, settings)).block.rope
    assert rope is not None
    assert rope.kind == wanted


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 8}, "dimension_count"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.attention.head_count": "four"}, "head_count"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv"),
        ({"llama.attention.sliding_window": 64}, "sliding_window"),
    ],
)
def test_settings_that_cannot_be_computed(
    tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(ModelError, match=word):
        config_of(read_gguf(write(tmp_path, settings)))


@pytest.mark.parametrize("context", [8192, 64])
def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path, context: int) -> None:
    """From what each frequency is divided by."""
    rope = RopeSpec(500000.0, "llama3", 32.0, 1.0, 4.0, context)
    plain, scaled = (rope_frequencies(r, 16) for r in (RopeSpec(500000.0), rope))
    factors = struct.pack("<8f", *(p / s for p, s in zip(plain, scaled, strict=True)))
    settings = {**SETTINGS, "llama.rope.freq_base": 500000.0}
    tensors = tensors_of() | {"rope_freqs.weight": (F32, (8,))}
    file = tmp_path / "model.gguf"
    file.write_bytes(content(settings, tensors, factors))
    found = spec_of(file).block.rope
    assert found is not None
    assert rope_frequencies(found, 16) == pytest.approx(scaled)
    file.write_bytes(content(settings, tensors, struct.pack("<8f", *range(1, 9))))
    with pytest.raises(UnsupportedArchitectureError, match=r"rope_freqs\.weight"):
        spec_of(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match="no file"):
        read_gguf(file)
    for wrong in (b"", b"GGUF", b"PK\x03\x04" + bytes(100)):
        file.write_bytes(wrong)
        with pytest.raises(ModelError, match="not a GGUF file"):
            read_gguf(file)
    good = content(SETTINGS, tensors_of())
    file.write_bytes(good[:4] + struct.pack(">I", 3) + good[8:])
    with pytest.raises(ModelError, match="little endian"):
        read_gguf(file)
    file.write_bytes(content({**SETTINGS, "split.count": 3}, tensors_of()))
    with pytest.raises(ModelError, match="one of several files"):
        read_gguf(file)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    for number, name in ((10, "Q2_K"), (39, "MXFP4"), (77, "77")):
        with pytest.raises(ModelError) as caught:
            read_gguf(write(tmp_path, ffn_up=number))
        assert "blk.0.ffn_up.weight" in caught.value.message
        assert name in caught.value.message
        assert "Q4_K" in caught.value.hint


def test_sizes_that_cannot_be_true(tmp_path: Path) -> None:
    """Counts, texts, offsets and shapes beyond the file."""
    file, good = tmp_path / "model.gguf", content(SETTINGS, tensors_of())
    huge = struct.pack("<Q", 1 << 60)
    first_key = len(b"GGUF") + 4 + 16
    array = content({**SETTINGS, "x": [1, 2, 3]}, {})
    where = array.index(text("x")) + len(text("x")) + 8
    for wrong, word in (
        (good[:8] + huge + good[16:], "tensors"),
        (good[:16] + huge + good[24:], "values"),
        (good[:first_key] + huge + good[first_key + 8 :], "bytes of text"),
        (array[:where] + huge + array[where + 8 :], "items of an array"),
        (good[:-40], "ends at byte"),
        (good[: len(good) // 3], "ends"),
        (content(SETTINGS, {"token_embd.weight": (Q8_0, (4, 33))}), "has shape"),
        (content(SETTINGS, {"token_embd.weight": (F32, (4, 0))}), "shape"),
        (content({**SETTINGS, "general.alignment": 0}, {}), "alignment"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(CorruptFileError, match=word):
            read_gguf(file)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    tensors = tensors_of()
    del tensors["token_embd.weight"]
    file.write_bytes(content(SETTINGS, tensors))
    with pytest.raises(MissingTensorError, match="token_embd"):
        spec_of(file)


@given(st.data())
def test_garbage_is_a_clear_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever stands in a file, it is read or refused."""
    good = bytearray(content({**SETTINGS, "tokenizer.ggml.tokens": ["a", "b"]}, tensors_of()))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("garbage") / "model.gguf"
    file.write_bytes(good[: data.draw(st.integers(0, len(good)))])
    with contextlib.suppress(ConfidantError):
        header = read_gguf(file)
        places_of(header, config_of(header))


def test_formats_have_names() -> None:
    for form in (GgufFormat(BY_NAME["Q6_K"]), GgufFormat(BY_NAME["F16"], 32)):
        assert GgufFormat.parse(form.dtype) == form
    for wrong in ("F16", "Q6_K", "GGUF:Q9_9", "GGUF:Q6_K:0", "GGUF:Q6_K:-1", "GGUF:Q6_K:", ""):
        assert GgufFormat.parse(wrong) is None
    assert not GgufFormat(BY_NAME["Q8_0"], 4).fits((36, 32))
    assert not GgufFormat(BY_NAME["Q4_K"]).fits((4, 128))
    assert not GgufFormat(BY_NAME["Q8_0"]).fits((32,))


def test_own_formats_are_the_largest_of_all_layers(tmp_path: Path) -> None:
    """A plan must not be too small for the layers that have more bits than others."""
    spec = spec_of(write(tmp_path))
    names = stage_tensor_names(spec, 0, LAYERS, embedding=True, head=True)
    dtypes = {name: "GGUF:Q4_K" if "norm" not in name else "F32" for name in names}
    dtypes["model.layers.1.mlp.down_proj.weight"] = "GGUF:Q6_K"
    dtypes["model.layers.0.mlp.up_proj.weight"] = "F16"
    formats = formats_of(own_spec(spec, own_formats(spec, dtypes)))
    assert formats["down"] == BlockFormat(8, 16)
    assert formats["q"] == formats["embedding"] == BlockFormat(4, 32, offsets=True)
    assert "up" not in formats


def test_memory_of_own_formats(tmp_path: Path) -> None:
    """Of a tied table the head is multiplied by in blocks, the embedding is looked up in."""
    spec = spec_of(write(tmp_path))
    names = stage_tensor_names(spec, 0, LAYERS, embedding=True, head=True)
    found = own_spec(spec, own_formats(spec, dict.fromkeys(names, "GGUF:Q8_0")))
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    assert block_bytes(found) == weights * (1 + 12 / 32) + 4 * 2 * 64
    assert embedding_bytes(found) == VOCABULARY * 64 * (1 + 4 / 32)
    assert head_bytes(found) == VOCABULARY * 64 * (2 + 12 / 32) + 4 * 64
    assert own_spec(spec, "") == spec
