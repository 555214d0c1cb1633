"""Generation with a KV cache over stages equals `transformers`, on random and real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from confidantd.engine.generation.stage import FusedStage
from confidantd.errors import WorkerError
from confidantd.models.folder import ModelFolder, read_model
from tests.component.engine_models import (
    SHARED_MODELS,
    Decoder,
    decoder,
    make_model,
    random_ids,
    reader,
    save_model,
    stage_specs,
)
from tests.component.test_engine_training import assert_close

KINDS = ("llama", "llama-tied", "llama-16", "llama-24", "gpt2", "gpt2-untied")
NEW_TOKENS = 32


def reference_tokens(model: Any, prompt: list[int]) -> list[int]:
    """Greedy continuation by `transformers`, with its own cache."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in found[0, len(prompt) :]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 3])
def test_greedy_tokens_equal_transformers(tmp_path: Path, kind: str, stages: int) -> None:
    """Prompt of several tokens, then one at a time, until the cache has grown."""
    decode = decoder(save_model(kind, tmp_path), stages)
    prompt = random_ids(5, 7 if kind.startswith("gpt2") else 50).tolist()
    assert decode.greedy(prompt, NEW_TOKENS) == reference_tokens(make_model(kind), prompt)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_logits_do_not_depend_on_chunks(tmp_path: Path, kind: str) -> None:
    """Whole, in chunks, token by token, and after a truncated detour; two sequences at once."""
    decode = decoder(save_model(kind, tmp_path), 2)
    ids = random_ids(6, 60).tolist()
    with torch.no_grad():
        wanted = make_model(kind)(torch.tensor([ids])).logits[0, -1].numpy()
    for sequence, sizes in enumerate(([60], [20, 39, 1], [1] * 60)):
        start = 0
        for size in sizes:
            found = decode.logits(ids[start : start + size], sequence)
            start += size
        assert_close(found, wanted, str(sizes), 1e-5)
    decode.logits(ids[:3], sequence=0)
    for stage in decode.stages:
        stage.truncate(0, 59)
        stage.truncate(1, 0)
    assert_close(decode.logits(ids[59:], sequence=0), wanted, "truncated", 1e-5)
    assert_close(decode.logits(ids, sequence=1), wanted, "truncated to nothing", 1e-5)
    for stage in decode.stages:
        for sequence in range(3):
            stage.release(sequence)
        assert stage.resident_bytes()["cache"] == 0


def test_learned_positions_end(tmp_path: Path) -> None:
    """A sequence longer than the position table is refused."""
    decode = decoder(save_model("gpt2", tmp_path), 1)
    decode.logits([1] * 64)
    with pytest.raises(WorkerError, match="65 tokens"):
        decode.logits([1])


def real_model(name: str) -> ModelFolder:
    """One of the real models; skips where they are not beside the checkout."""
    folder = SHARED_MODELS / name
    if not folder.is_dir():
        pytest.skip(f"the real model {name} is not on this machine")
    return read_model(folder)


def test_real_llama_tells_its_story() -> None:
    """The known greedy continuation, over three stages."""
    model = real_model("stories260K")
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    prompt = list(tokenizer.encode("Once upon a time").ids)
    found = decoder(model, 3).greedy(prompt, 40)
    assert tokenizer.decode(prompt + found).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )


def test_real_gpt2_sorts() -> None:
    """An exact-answer model: six letters come back sorted."""
    decode = decoder(real_model("gpt-nano-sort"), 2)
    for sequence, letters in enumerate([[2, 1, 0, 1, 0, 0], [0, 2, 2, 1, 1, 0], [2] * 6]):
        assert decode.greedy(letters, 6, sequence) == sorted(letters)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_memory_mapped_weights_are_not_copied(tmp_path: Path, kind: str) -> None:
    """What a checkpoint stores in float32 stays a view of its file."""
    (stage,) = decoder(save_model(kind, tmp_path), 1).stages
    assert isinstance(stage, FusedStage)
    for name, weight in stage._weights.items():
        assert isinstance(weight, np.memmap), name
        assert not weight.flags.owndata, name
        assert not weight.flags.writeable, name


def test_the_session_computes_with_the_weights_where_they_lie(tmp_path: Path) -> None:
    """Other numbers there give other logits: it has no copy of its own."""
    model = save_model("llama", tmp_path)
    kept: dict[str, Any] = {}

    def read(name: str) -> Any:
        return kept.setdefault(name, np.array(reader(model.tensors)(name)))

    (spec,) = stage_specs(model, 1, training=None, lora=None)
    stage, ids = FusedStage(spec, read, None, 1), random_ids(1, 1, 5)
    before = stage.forward([0], ids)
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        kept[name] *= 1.5
        after = stage.forward([len(kept)], ids)
        assert np.abs(after - before).max() > 1e-3, name
        before = after
        stage.release(len(kept))


@pytest.mark.parametrize("kind", ["llama", "llama-16", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_16_bits(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Computed with in float32; a table that is both ends is there once."""
    narrow: Any = make_model(kind).to(dtype)
    narrow.save_pretrained(tmp_path)
    torch_model = type(narrow).from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = read_model(tmp_path)
    decode, ids = decoder(model, 1), random_ids(2, 9)
    with torch.no_grad():
        wanted = torch_model(torch.tensor(ids[None])).logits[0, -1].numpy()
    assert_close(decode.logits(ids.tolist()), wanted, kind, 1e-5)
    (stage,) = decode.stages
    assert isinstance(stage, FusedStage)
    assert ("lm_head.weight" in stage._weights) != model.spec.tied


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_several_positions(tmp_path: Path, kind: str) -> None:
    """Of guesses behind a token, also after wrong ones were taken back."""
    decode, ids = decoder(save_model(kind, tmp_path), 2), random_ids(8, 1, 20)
    with torch.no_grad():
        wanted = make_model(kind)(torch.tensor(ids)).logits.numpy()
    first, last = decode.stages
    for past, wrong in ((0, 0), (9, 0), (12, 3), (15, 5)):
        if wrong:
            last.forward([0], first.forward([0], ids[:, :wrong]), wrong)
        for stage in decode.stages:
            stage.truncate(0, past)
        more = ids[:, past : past + 5] if past else ids[:, :9]
        found = last.forward([0], first.forward([0], more), 4)
        end = past + more.shape[1]
        assert_close(found, wanted[:, end - 4 : end], f"{past}", 1e-5)


class Batches:
    """Sequences that go on together."""

    def __init__(self, decode: Decoder) -> None:
        self._decode = decode
        self.tokens: dict[int, list[int]] = {}

    def start(self, number: int, prompt: list[int]) -> None:
        """A prompt, alone."""
        self.tokens[number] = [int(self._decode.logits(prompt, number).argmax())]

    def step(self, *numbers: int) -> None:
        """One more token for each of these, all in one run."""
        fed = np.array([[self.tokens[number][-1]] for number in numbers])
        for number, row in zip(numbers, self._decode.batch(fed, numbers), strict=True):
            self.tokens[number].append(int(row.argmax()))

    def release(self, number: int) -> None:
        """Forget it."""
        for stage in self._decode.stages:
            stage.release(number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_mixed_batch_gives_each_the_tokens_it_gets_alone(
    tmp_path: Path, kind: str, stages: int
) -> None:
    """Eight prompts of different lengths in one run a step; one ends, others come, some go on
    alone for a while and join again in another order.
    """
    decode, model = decoder(save_model(kind, tmp_path), stages), make_model(kind)
    prompts = [random_ids(20 + n, 3 + 2 * n).tolist() for n in range(10)]
    batches = Batches(decode)
    for number in range(8):
        batches.start(number, prompts[number])
    for _ in range(4):
        batches.step(*range(8))
    batches.release(2)
    batches.start(8, prompts[8])
    for _ in range(3):
        batches.step(0, 8, 1, 3, 4, 5, 6, 7)
    batches.start(9, prompts[9])
    batches.step(7, 6, 5)
    for _ in range(5):
        batches.step(9, 7, 6, 5, 4, 3, 1, 8, 0)
    for number, tokens in batches.tokens.items():
        wanted = reference_tokens(model, prompts[number])
        assert tokens == wanted[: len(tokens)], number
        assert len(tokens) >= 5
        batches.release(number)
    assert all(stage.resident_bytes()["cache"] == 0 for stage in decode.stages)
