"""Generation in parts on several backends gives the tokens and logits of the fused blocks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from confidantd.config import Split
from confidantd.engine.backends.base import Backend
from confidantd.engine.backends.cpu import CpuBackend
from confidantd.engine.split.blocks import ATTENTION, MLP
from confidantd.engine.split.decode import SplitDecode
from confidantd.engine.split.decode_stage import SplitStage
from confidantd.engine.split.parts import BackendPrograms, BackendThread
from confidantd.engine.split.plan import Placement, make_parts
from confidantd.errors import BackendError
from confidantd.models.folder import ModelFolder
from confidantd.models.spec import ProgramRequest
from tests.component.engine_models import (
    Adapter,
    Decoder,
    decoder,
    random_ids,
    reader,
    save_model,
    stage_specs,
)
from tests.component.split_support import Heard
from tests.component.test_engine_lora import prepared
from tests.component.test_engine_training import assert_close
from tests.component.test_split_blocks import SECONDS, Failing
from tests.programs import programs_for

TOLERANCE = 1e-5  # relative to the largest logit
NEW_TOKENS = 12
PROMPT = random_ids(5, 7).tolist()


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A Llama with grouped queries, one with biases and odd heads, a GPT-2."""
    return save_model(request.param, tmp_path_factory.mktemp(request.param))


def stage_of(model: ModelFolder, adapter: Adapter | None = None) -> SplitStage:
    """The whole model in one stage, with the programs of parts."""
    request = ProgramRequest(model.spec, "generate")
    split = ProgramRequest(model.spec, "generate", split=True)
    lora = None if adapter is None else adapter.lora
    (spec,) = stage_specs(model, 1, training=None, lora=lora)
    programs = programs_for(request) | programs_for(split)
    read_adapter = None if adapter is None else adapter.reader()
    return SplitStage(spec, programs, reader(model.tensors), read_adapter, 2)


@contextmanager
def split_decoder(
    model: ModelFolder,
    backends: Sequence[Backend],
    groups: Sequence[int],
    columns: Sequence[int],
    adapter: Adapter | None = None,
) -> Iterator[tuple[Decoder, list[str]]]:
    """A decoder with so many groups and columns on each backend, and who failed in it."""
    stage, told = stage_of(model, adapter), list[str]()

    def failed(name: str, failure: BackendError) -> None:
        told.append(f"{name}: {failure.message}")

    made = [BackendPrograms(backend, stage._paths, 1) for backend in backends]
    threads = [BackendThread(backend.name) for backend in backends]
    placement = Placement({ATTENTION: tuple(groups), MLP: tuple(columns)})
    parts = make_parts(model.spec, None, made, threads, placement)
    stage._runner = SplitDecode(parts, BackendPrograms(CpuBackend(), stage._paths, 1), failed)
    try:
        yield Decoder([stage]), told
    finally:
        for thread in threads:
            thread.close()


def assert_same(found: Decoder, wanted: Decoder) -> None:
    """Logits of a prompt, greedy tokens after it, and logits after those."""
    assert_close(found.logits(PROMPT, 7), wanted.logits(PROMPT, 7), "prompt", TOLERANCE)
    tokens = wanted.greedy(PROMPT, NEW_TOKENS)
    assert found.greedy(PROMPT, NEW_TOKENS) == tokens
    assert_close(found.logits(tokens[-1:]), wanted.logits(tokens[-1:]), "after", TOLERANCE)


@pytest.mark.parametrize("second", SECONDS)
def test_every_split_of_heads(model: ModelFolder, second: str) -> None:
    """Columns apart, or all on the other backend than the heads."""
    backends = [CpuBackend(), SECONDS[second]()]
    block = model.spec.block
    third = block.columns // 3
    for groups in range(block.kv_heads + 1):
        here = {0: block.columns, block.kv_heads: 0}.get(groups, third)
        shares = (groups, block.kv_heads - groups), (here, block.columns - here)
        with split_decoder(model, backends, *shares) as (found, told):
            assert_same(found, decoder(model, 1))
        assert told == []


def test_a_merged_adapter_is_split_too(tmp_path: Path) -> None:
    """Shares are those of the merged weights."""
    _, model, adapter = prepared("llama", tmp_path)
    with split_decoder(model, [CpuBackend()] * 2, (1, 1), (16, 40), adapter) as (found, _):
        assert_same(found, decoder(model, 1, adapter))


def test_logits_of_several_positions(model: ModelFolder) -> None:
    """As the whole program gives them."""
    ids = random_ids(4, 1, 9)
    with split_decoder(model, [CpuBackend()] * 2, *_halves(model)) as (found, _):
        (stage,), (whole,) = found.stages, decoder(model, 1).stages
        assert_close(stage.forward([0], ids, 4), whole.forward([0], ids, 4), "rows", TOLERANCE)


def _halves(model: ModelFolder) -> tuple[tuple[int, int], tuple[int, int]]:
    block = model.spec.block
    groups, columns = block.kv_heads // 2, block.columns // 2
    return (block.kv_heads - groups, groups), (block.columns - columns, columns)


def test_chunks_truncation_and_two_sequences(model: ModelFolder) -> None:
    """Prompts in pieces, past the first growth of the cache, two in turn, and one taken back."""
    block, ids = model.spec.block, [random_ids(seed, 70).tolist() for seed in (1, 2)]
    if model.spec.positions == "learned":
        ids = [each[:64] for each in ids]
    wanted = decoder(model, 1)
    groups, columns = (1, block.kv_heads - 1), (block.columns - 8, 8)
    with split_decoder(model, [CpuBackend()] * 2, groups, columns) as (found, _):
        (stage,) = found.stages
        for start, end in itertools.pairwise((0, 1, 20, 21, 63, len(ids[0]))):
            for sequence in (0, 1):
                piece = ids[sequence][start:end]
                if piece:
                    logits = found.logits(piece, sequence)
                    expected = wanted.logits(piece, sequence)
                    assert_close(logits, expected, f"{sequence} at {start}", TOLERANCE)
        last = logits
        stage.truncate(1, 30)
        assert_close(found.logits(ids[1][30:], 1), last, "truncated", TOLERANCE)
        for sequence in (0, 1):
            stage.release(sequence)
        assert stage.resident_bytes()["cache"] == 0
        assert stage.resident_bytes()["weights"] == wanted.stages[0].resident_bytes()["weights"]


@pytest.mark.parametrize("good_runs", [0, 1, 3, 6, 8, 17, 40])
def test_a_backend_that_fails_is_replaced_and_no_token_changes(
    tmp_path: Path, good_runs: int
) -> None:
    """In the prompt or later, in attention or MLP; six programs a step."""
    model = save_model("llama", tmp_path)
    backends = [CpuBackend(), Failing(good_runs)]
    with split_decoder(model, backends, (1, 1), (40, 16)) as (found, told):
        assert found.greedy(PROMPT, NEW_TOKENS) == decoder(model, 1).greedy(PROMPT, NEW_TOKENS)
    assert len(told) == 1
    assert "the driver is gone" in told[0]


@contextmanager
def scheduled(model: ModelFolder, second: Backend, heard: Heard, split: Split) -> Iterator[Decoder]:
    """A decoder that has measured its backends."""
    stage = stage_of(model)
    stage.schedule([CpuBackend(), second], heard, heard, split)
    try:
        yield Decoder([stage])
    finally:
        stage.close()


def test_measured_shares_are_remembered_and_tokens_stay(tmp_path: Path) -> None:
    model = save_model("gpt2", tmp_path)
    heard = Heard()
    with scheduled(model, Failing(100_000), heard, "always") as found:
        assert_same(found, decoder(model, 1))
    (split,) = heard.chosen_splits
    assert heard.names == [["cpu", "failing"]]
    assert sum(share.heads for share in split.shares) == 4
    assert sum(share.columns for share in split.shares) == 128
    assert split.seconds > 0
    assert heard.measured[0] == heard.measured[1] > 0
    again = Heard(kept=heard.kept)
    with scheduled(model, Failing(100_000), again, "always"):
        pass
    assert again.measured == (0, 0)
    assert again.chosen_splits == heard.chosen_splits


@pytest.mark.parametrize("split", ["auto", "never"])
def test_tiny_blocks_run_whole(tmp_path: Path, split: Split) -> None:
    """Too fast to wake a thread for; what was measured then does not answer `always`."""
    model = save_model("llama", tmp_path)
    heard = Heard()
    with scheduled(model, Failing(100_000), heard, split) as found:
        assert_same(found, decoder(model, 1))
    assert [len(names) for names in heard.names] == [1]
    assert heard.measured == (0, 0)
    with scheduled(model, Failing(100_000), heard, "always"):
        assert heard.names[-1] == ["cpu", "failing"]


def test_a_backend_that_fails_later_is_left_out_once(tmp_path: Path) -> None:
    """The others share out its work between two blocks, and no token changes."""
    model = save_model("llama", tmp_path)
    wanted = decoder(model, 1).greedy(PROMPT, NEW_TOKENS)
    heard, second = Heard(), Failing(100_000)
    with scheduled(model, second, heard, "always") as found:
        second.left = 9
        assert found.greedy(PROMPT, NEW_TOKENS) == wanted
    assert heard.names == [["cpu", "failing"], ["cpu"]]
    (told,) = heard.notices
    assert told.startswith("backend-left-out: failing is left out and the job goes on without it (")


@pytest.mark.parametrize("good_runs", [0, 5, 40])
def test_a_backend_that_fails_while_measured_is_left_out(tmp_path: Path, good_runs: int) -> None:
    """Nothing is remembered of it: it may be well the next time."""
    model = save_model("llama", tmp_path)
    heard = Heard()
    with scheduled(model, Failing(good_runs), heard, "always") as found:
        assert found.greedy(PROMPT, 3) == decoder(model, 1).greedy(PROMPT, 3)
    assert heard.names == [["cpu"]]
    assert len(heard.notices) == 1
    assert heard.kept is None


def test_a_backend_that_fails_alone_hands_over_to_the_cpu(tmp_path: Path) -> None:
    """Whole blocks, in the middle of a text."""
    model = save_model("llama", tmp_path)
    wanted = decoder(model, 1).greedy(PROMPT, NEW_TOKENS)
    heard, second = Heard(), Failing(100_000)
    with scheduled(model, second, heard, "never"):
        assert heard.kept is not None
    profile = json.loads(heard.kept)
    assert profile["alone"][0]["backend"] == "cpu"
    profile["alone"][0]["forward_seconds"] = 1.0
    heard = Heard(kept=json.dumps(profile).encode())
    with scheduled(model, second, heard, "never") as found:
        assert heard.names == [["failing"]]
        second.left = 20
        assert found.greedy(PROMPT, NEW_TOKENS) == wanted
    assert heard.names == [["failing"], ["cpu"]]
    assert len(heard.notices) == 1
