"""Model folders: what is read, and one clear error for everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import (
    CorruptFileError,
    MissingTensorError,
    ModelError,
    UnsupportedArchitectureError,
)
from confidantd.models.folder import read_model
from confidantd.models.safetensors import Piece, read_header, write_file
from tests.unit.model_files import GPT2, LLAMA, pieces_of, write_model


def test_reads_a_model(tmp_path: Path) -> None:
    """Spec, tensor places, and the files that go with the model."""
    write_model(tmp_path, LLAMA)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = read_model(tmp_path)
    assert (model.spec.family, model.spec.layers, model.spec.end_tokens) == ("llama", 2, (2,))
    assert [p.name for p in model.tokenizer_files] == ["tokenizer.json"]
    assert [p.name for p in model.config_files] == ["config.json"]
    assert len(model.tensors) == 2 * 9 + 3
    at = model.tensors["model.layers.1.mlp.down_proj.weight"]
    assert (at.dtype, at.shape, at.bytes) == ("F32", (8, 12), 8 * 12 * 4)


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    """As `generate` of transformers does; a null there leaves config.json's."""
    write_model(tmp_path, GPT2)
    assert read_model(tmp_path).spec.end_tokens == (3, 4)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_model(tmp_path).spec.end_tokens == (9,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_model(tmp_path).spec.end_tokens == (3, 4)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_names_of_the_bare_model_are_read_too(tmp_path: Path, config: dict[str, object]) -> None:
    """Checkpoints without the `model.` or `transformer.` prefix, and with buffers beside."""
    bare = [
        dataclasses.replace(p, name=p.name.removeprefix("model.").removeprefix("transformer."))
        for p in pieces_of(config)
    ]
    extra = Piece("h.0.attn.bias", "U8", (1, 1, 2, 2), bytes(4))
    assert list(read_model(write_model(tmp_path, config, [*bare, extra])).tensors) == [
        p.name for p in pieces_of(config)
    ]


def test_sharded_model(tmp_path: Path) -> None:
    """Two files and an index."""
    pieces = pieces_of(LLAMA)
    write_model(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for name, part in (("one.safetensors", pieces[:7]), ("two.safetensors", pieces[7:])):
        write_file(tmp_path / name, part)
        weight_map |= {p.name: name for p in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    tensors = read_model(tmp_path).tensors
    assert {at.file.name for at in tensors.values()} == {"one.safetensors", "two.safetensors"}

    index.write_text(json.dumps({"weight_map": weight_map | {"more": "one.safetensors"}}))
    with pytest.raises(MissingTensorError, match="lacks 'more'"):
        read_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../one.safetensors"}}))
    with pytest.raises(CorruptFileError, match="not a file here"):
        read_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {pieces[0].name: "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors does not exist"):
        read_model(tmp_path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    """The name of the tensor, and both shapes."""
    pieces = pieces_of(LLAMA)
    gone = pieces.pop(4)
    with pytest.raises(MissingTensorError, match=gone.name):
        read_model(write_model(tmp_path, LLAMA, pieces))
    short = Piece(gone.name, "F32", (3,), bytes(12))
    with pytest.raises(ModelError, match=rf"{gone.name} has shape \[3\], config.json asks for"):
        read_model(write_model(tmp_path, LLAMA, [*pieces, short]))
    with pytest.raises(ModelError, match="dtype I8"):
        read_model(write_model(tmp_path, LLAMA, pieces_of(LLAMA, "I8")))


def test_tied_head_may_only_be_a_copy(tmp_path: Path) -> None:
    """A stored LM head that differs from the table would be lost silently."""
    config = dict(LLAMA, tie_word_embeddings=True)
    pieces = pieces_of(config)
    assert "lm_head.weight" not in {p.name for p in pieces}
    head = Piece("lm_head.weight", "F32", (11, 8), bytes(11 * 8 * 4))
    assert (
        "lm_head.weight" not in read_model(write_model(tmp_path, config, [*pieces, head])).tensors
    )
    other = dataclasses.replace(head, data=b"\1" * (11 * 8 * 4))
    with pytest.raises(ModelError, match="ties the LM head"):
        read_model(write_model(tmp_path, config, [*pieces, other]))


def test_unsupported_architecture_names_the_supported(tmp_path: Path) -> None:
    """The families that there are."""
    write_model(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba'.*gpt2, llama"):
        read_model(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "nonsense"])
def test_bad_config_is_a_model_error(tmp_path: Path, content: str) -> None:
    """Not JSON, or not an object."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model(tmp_path)


def test_folders_without_a_model(tmp_path: Path) -> None:
    """No folder, no config, no weights, pickled weights."""
    with pytest.raises(ModelError, match="is not a folder"):
        read_model(tmp_path / "none")
    with pytest.raises(ModelError, match="does not exist"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        read_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        read_model(tmp_path)


def raw(header: object, data: bytes = b"") -> bytes:
    """A file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], first: int, past: int) -> dict[str, object]:
    """A header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, past]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x00",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 5) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"\xff{}",
        raw({"a": 1}),
        raw({"a": {"dtype": "F32"}}),
        raw({"a": entry("F32", [2], 0, 8)}, bytes(7)),
        raw({"a": entry("F32", [2], 0, 4)}, bytes(8)),
        raw({"a": entry("F32", [-2], 0, 8)}, bytes(8)),
        raw({"a": entry("F32", [2], 8, 0)}, bytes(8)),
        raw({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)),
        raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        raw({"a": entry("F32", [1 << 47, 1 << 47], 0, 8)}, bytes(8)),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Truncated or lying headers; nothing is allocated for what they claim."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is damaged"):
        read_header(path)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_garbage_never_fails_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    """Any bytes give a header or a ModelError."""
    path = tmp_path_factory.mktemp("garbage") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":' + data)
    message = "x"
    try:
        read_header(path)
    except ModelError as failure:
        message = failure.message
    assert message.isprintable()


def test_pieces_come_from_bytes_files_and_ranges(tmp_path: Path) -> None:
    """The writer streams from each, and reading gives the same places back."""
    (tmp_path / "raw").write_bytes(b"abcdefgh")
    write_file(tmp_path / "one", [Piece("x", "F32", (1,), b"wxyz")])
    inside = read_header(tmp_path / "one")["x"]
    pieces = [
        Piece("a", "F32", (2,), tmp_path / "raw"),
        Piece("b", "F32", (1,), inside),
        Piece("c", "BF16", (0, 3), b""),
    ]
    size = write_file(tmp_path / "two", pieces)
    data = (tmp_path / "two").read_bytes()
    assert len(data) == size
    found = read_header(tmp_path / "two")
    assert [data[at.offset : at.offset + at.bytes] for at in found.values()] == [
        b"abcdefgh",
        b"wxyz",
        b"",
    ]
    assert found["a"].offset % 8 == 0
    with pytest.raises(CorruptFileError, match="8 bytes where 12"):
        write_file(tmp_path / "three", [Piece("a", "F32", (3,), tmp_path / "raw")])
