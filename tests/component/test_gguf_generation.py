"""Generation from GGUF files: the tokens that the format defines, for every type of tensor."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from confidantd.engine.backends.base import SessionSetting
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.block_speed import Bench
from confidantd.engine.generation.onnx_graph import Graph
from confidantd.engine.generation.quantised_nodes import quantised_product, table_rows
from confidantd.engine.generation.stage import FusedStage
from confidantd.engine.gguf_matrix import gguf_matrix, matrix_room
from confidantd.engine.scratch import Scratch
from confidantd.engine.tensors import tensor_from_file
from confidantd.errors import CorruptFileError, ModelError, StorageError
from confidantd.ids import Digest
from confidantd.models.folder import ModelFolder, read_model
from confidantd.models.gguf import read_gguf
from confidantd.models.gguf_format import BY_NAME, GgufFormat
from confidantd.models.gguf_model import config_of, places_of
from confidantd.models.imported import INDEX, identity
from confidantd.models.quantisation import own_spec
from confidantd.models.safetensors import TensorLocation
from confidantd.models.spec import ProgramRequest
from confidantd.wire.stage import TensorEntry
from confidantd.wire.worker import BlobRange
from confidantd.worker.blobs import any_reader, reader, scratch_bytes
from tests.component.engine_models import Decoder, random_ids, stage_specs
from tests.component.test_engine_decoding import real_model
from tests.gguf_files import QUANTISED, describe_tokenizer, random_blocks, write_gguf

NEW_TOKENS = 32
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def make_model(*, tied: bool = False, rope: dict[str, Any] | None = None, **more: Any) -> Any:
    """A random Llama whose rows are whole blocks of every type."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=61, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 500.0}, **more,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.12)
    return model.eval()


def imported(file: Path, folder: Path) -> ModelFolder:
    """The folder that an import makes, without a tokenizer."""
    header = read_gguf(file)
    config = config_of(header)
    folder.mkdir()
    index = {"source": identity(file), "tensors": places_of(header, config)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps(index))
    return read_model(folder)


def material(
    model: ModelFolder,
) -> tuple[tuple[TensorEntry, ...], dict[Digest, BlobRange], dict[str, TensorLocation]]:
    """What a worker is given: a tied table twice, as its head may be multiplied by in blocks."""
    spec, tensors = own_spec(model.spec, model.formats), dict(model.tensors)
    if model.spec.tied and not spec.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    entries, blobs = [], {}
    for name, at in tensors.items():
        digest = Digest(name)
        entries.append(TensorEntry(name, at.dtype, at.shape, at.bytes, digest))
        blobs[digest] = BlobRange(str(at.file), at.offset, at.bytes)
    return tuple(entries), blobs, tensors


def gguf_decoder(model: ModelFolder, stages: int, folder: Path) -> Decoder:
    """Stages as workers make them."""
    spec = own_spec(model.spec, model.formats)
    entries, blobs, _ = material(model)
    specs = [dataclasses.replace(s, model=spec) for s in stage_specs(model, stages, training=None)]
    found = []
    for stage in specs:
        with Scratch(folder, scratch_bytes(entries)) as scratch:
            found.append(FusedStage(stage, any_reader(entries, blobs, scratch), None, 1))
    return Decoder(found)


def float_decoder(model: ModelFolder) -> Decoder:
    """One stage over the weights in float32."""
    entries, blobs, _ = material(model)
    (spec,) = stage_specs(model, 1, training=None)
    return Decoder([FusedStage(spec, reader(entries, blobs), None, 1)])


def reference_tokens(model: Any, prompt: list[int]) -> list[int]:
    """Greedy continuation by `transformers`."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in found[0, len(prompt) :]]


def only(kind: str) -> Callable[[str], str]:
    """All matrices of one type."""
    return lambda _: kind


def mixed(name: str) -> str:
    """As a Q4_K_M file: values and half of the down projections have more bits."""
    if name in ("token_embd.weight", "output.weight") or "attn_v" in name:
        return "Q6_K"
    return "Q6_K" if name == "blk.0.ffn_down.weight" else "Q4_K"


KINDS = {kind: only(kind) for kind in (*QUANTISED, "F32", "F16", "BF16")} | {"mixed": mixed}


@pytest.mark.parametrize("kind", ["Q8_0", "mixed"])
def test_the_files_are_such_as_transformers_reads(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reader of GGUF files finds the same model: the order of rows is `llama.cpp`'s."""
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)  # a thread that outlives its test
    source = real_model("stories260K").path / "tokenizer.json"
    describe = describe_tokenizer(
        json.loads(source.read_text()), bos_token_id=1, eos_token_id=2, unknown_token_id=0
    )
    torch_model, ids = make_model(), torch.tensor(random_ids(5, 1, 40))
    write_gguf(tmp_path / "m.gguf", torch_model, KINDS[kind], describe)
    read: Any = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, torch_model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_weights(tmp_path: Path, kind: str, tied: bool) -> None:
    """Over one and two stages, within what 8 bits of a hidden state lose; exactly, where the
    weights are computed with in float32.
    """
    torch_model = make_model(tied=tied, rope=LLAMA3 if tied else None)
    model = imported(write_gguf(tmp_path / "m.gguf", torch_model, KINDS[kind]), tmp_path / "m")
    prompt = random_ids(5, 40).tolist()
    with torch.no_grad():
        wanted = torch_model(torch.tensor([prompt])).logits[0, -1].numpy()
    most = np.abs(wanted).max()
    assert np.abs(float_decoder(model).logits(prompt) - wanted).max() < 1e-4 * most
    one, two = (gguf_decoder(model, stages, tmp_path).logits(prompt) for stages in (1, 2))
    rounded = kind in QUANTISED or kind == "mixed"
    assert np.abs(one - wanted).max() < (0.06 if rounded else 1e-4) * most
    assert np.abs(two - one).max() < (0.005 if rounded else 1e-4) * most


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "F16"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_real_model_gives_the_tokens_of_its_weights(
    tmp_path: Path, kind: str, stages: int
) -> None:
    """Greedy, as `transformers` does with what the format says that they are."""
    folder = real_model("stories260K").path
    torch_model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    file = write_gguf(tmp_path / "m.gguf", torch_model, only(kind), made_up=False)
    model = imported(file, tmp_path / "m")
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Once upon a time").ids
    found = gguf_decoder(model, stages, tmp_path).greedy(prompt, NEW_TOKENS)
    assert found == reference_tokens(torch_model, prompt)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_mix_of_types_gives_the_tokens_of_its_weights(tmp_path: Path, stages: int) -> None:
    """Q4_K and Q6_K: a model whose tokens are farther from each other than 8 bits of a hidden
    state can move them.
    """
    torch_model = make_model(rope=LLAMA3)
    file = write_gguf(tmp_path / "m.gguf", torch_model, mixed, spread=0.03, seed=2)
    prompt = random_ids(5, 40).tolist()
    found = gguf_decoder(imported(file, tmp_path / "m"), stages, tmp_path)
    tokens = found.greedy(prompt, NEW_TOKENS)
    assert tokens == reference_tokens(torch_model, prompt)
    assert len(set(tokens)) > 5


@pytest.mark.parametrize("kind", QUANTISED)
def test_products_are_exact(tmp_path: Path, kind: str) -> None:
    """With inputs that 8 bits a block hold without loss, only additions round."""
    width, rows = 512, 48
    form, stored = GgufFormat(BY_NAME[kind]), random_blocks(kind, rows, width, 3)
    (tmp_path / "blocks").write_bytes(bytes(7) + stored.tobytes())
    with Scratch(tmp_path, matrix_room(form, (rows, width))) as scratch:
        matrix = gguf_matrix(tmp_path / "blocks", 7, form, (rows, width), scratch)
    values = dequantize(stored, GGMLQuantizationType[kind])
    assert np.array_equal(
        tensor_from_file(tmp_path / "blocks", 7, form.dtype, (rows, width)), values
    )
    assert np.abs(matrix.values() - values).max() <= 2e-7 * np.abs(values).max() * 8
    x = np.random.default_rng(1).integers(-127, 128, (1, 5, width)).astype(np.float32)
    x[..., ::16] = 127  # the largest of each block: its scale is 1
    graph = Graph()
    graph.input("x", "b", "T", width)
    graph.output("y", "b", "T", rows)
    graph.node("Identity", (quantised_product(graph, "w", matrix, "x"),), ("y",))
    session = CpuBackend().written_session(graph.file(), graph.packed, SessionSetting(1))
    (found,) = session.run(["y"], {"x": x, **graph.bound})
    wanted = x.astype(np.float64) @ values.T.astype(np.float64)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_of_a_table_are_exact(tmp_path: Path, kind: str) -> None:
    """Also of a table that has no whole number of chunks."""
    width, rows = 256, 37
    form, stored = GgufFormat(BY_NAME[kind]), random_blocks(kind, rows, width, 4)
    (tmp_path / "blocks").write_bytes(stored.tobytes())
    with Scratch(tmp_path, matrix_room(form, (rows, width))) as scratch:
        table = gguf_matrix(tmp_path / "blocks", 0, form, (rows, width), scratch)
    ids = np.array([[0, 36, 5, 5], [1, 2, 3, 30]])
    graph = Graph()
    graph.input("ids", "b", "T", element="int64")
    graph.output("y", "b", "T", width)
    graph.node("Identity", (table_rows(graph, "w", table, "ids"),), ("y",))
    session = CpuBackend().written_session(graph.file(), graph.packed, SessionSetting(1))
    (found,) = session.run(["y"], {"ids": ids, **graph.bound})
    wanted = dequantize(stored, GGMLQuantizationType[kind])[ids]
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_the_packed_weights_leave_memory(tmp_path: Path) -> None:
    """They are in a file without a name, which nothing but the maps holds."""
    torch_model = make_model()
    model = imported(write_gguf(tmp_path / "m.gguf", torch_model, only("Q4_K")), tmp_path / "m")
    (stage,) = gguf_decoder(model, 1, tmp_path).stages
    assert isinstance(stage, FusedStage)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "m"}
    for name, weight in stage._weights.items():
        assert isinstance(weight, np.memmap), name


def test_its_blocks_can_be_measured(tmp_path: Path) -> None:
    """With some numbers in the formats that the file has."""
    model = imported(write_gguf(tmp_path / "m.gguf", make_model(), mixed), tmp_path / "m")
    request = ProgramRequest(own_spec(model.spec, model.formats), "generate")
    found = Bench(request, {}, 1, ends=True, traffic=lambda _: 0.0).speeds(lambda *_: None)
    assert found.forward > 0
    assert found.head


def test_a_full_disk_is_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with Scratch(tmp_path, 64) as scratch, pytest.raises(StorageError, match="No space left"):
        scratch.region((4,), np.float32).write(0, np.ones(4, np.float32))


def test_no_scratch_file_is_a_clear_line(tmp_path: Path) -> None:
    for folder, size in ((tmp_path / "missing", 64), (tmp_path, 1 << 62), (tmp_path, 1 << 70)):
        with pytest.raises(StorageError, match="cannot write in"):
            Scratch(folder, size)


def test_a_file_that_became_shorter_is_a_clear_line(tmp_path: Path) -> None:
    """A worker trusts no size."""
    (tmp_path / "blocks").write_bytes(bytes(33))
    with pytest.raises(CorruptFileError, match="shorter"):
        tensor_from_file(tmp_path / "blocks", 0, "GGUF:Q8_0", (1, 32))
    for shape in ((1, 33), (32,), (1, 1, 32)):
        with pytest.raises(ModelError, match="cannot have shape"):
            tensor_from_file(tmp_path / "blocks", 0, "GGUF:Q8_0", shape)
