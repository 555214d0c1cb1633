"""The memory model: what each method holds, and what grows with what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.planner.memory import (
    HEAD_BYTES,
    LEAST_CHUNK,
    PREFILL_BYTES,
    PROVIDER_BYTES,
    MemoryEstimate,
    enforced_bytes,
    head_chunk,
    prefill_chunk,
    stage_memory,
)
from confidantd.planner.workload import Method, Workload
from tests.unit.planner_support import workload


def middle(work: Workload, layers: int = 2) -> MemoryEstimate:
    """A stage between the ends."""
    return stage_memory(work, layers, embedding=False, head=False, stage=1, stages=3)


def test_full_fine_tuning_takes_16_bytes_per_parameter() -> None:
    found = middle(workload())
    parameters = 2 * workload().block_parameters
    assert found.weights == found.gradients == 4 * parameters
    assert found.weights + found.gradients + found.moments == 16 * parameters


def test_lora_trains_the_adapter_only() -> None:
    work = workload(method="lora")
    found = middle(work)
    assert found.weights == 4 * 2 * (work.block_parameters + work.block_adapter)
    assert found.gradients == 4 * 2 * work.block_adapter
    assert found.moments == 2 * found.gradients


def test_generation_holds_weights_and_a_cache() -> None:
    found = middle(workload(method=None))
    assert found.gradients == found.moments == found.kept == 0
    assert found.cache > 0


@pytest.mark.parametrize(("stage", "in_flight"), [(0, 3), (1, 2), (2, 1)])
def test_block_inputs_and_middles_are_kept_for_microbatches_in_flight(
    stage: int, in_flight: int
) -> None:
    work = workload()
    head = stage == 2
    found = stage_memory(work, 2, embedding=stage == 0, head=head, stage=stage, stages=3)
    assert found.kept == in_flight * (5 if head else 4) * 4 * 2 * 128 * 768


def test_a_tied_table_on_one_device_counts_once() -> None:
    tied, untied = (
        stage_memory(workload(tied=t), 6, embedding=True, head=True, stage=0, stages=1).weights
        for t in (True, False)
    )
    assert untied - tied == 4 * workload().head_parameters


def test_the_total_is_the_sum_of_the_kinds() -> None:
    found = MemoryEstimate(1, 2, 3, 4, 5, 6, 7, 8)
    assert found.total == 36


@given(
    method=st.sampled_from(["full", "lora", None]),
    layers=st.integers(1, 12),
    size=st.integers(1, 4),
    length=st.sampled_from([16, 64, 256]),
    head=st.booleans(),
)
def test_more_of_anything_never_takes_less(
    method: Method | None, layers: int, size: int, length: int, head: bool
) -> None:
    work = workload(method=method, microbatch_size=size, sequence_length=length)

    def total(work: Workload, layers: int, *, head: bool) -> int:
        return stage_memory(work, layers, embedding=False, head=head, stage=1, stages=2).total

    least = total(work, layers, head=head)
    assert total(work, layers + 1, head=head) > least
    assert total(replace(work, microbatch_size=size + 1), layers, head=head) >= least
    assert total(replace(work, sequence_length=length + 1), layers, head=head) >= least
    assert total(work, layers, head=True) >= least


def test_a_further_backend_takes_its_library_and_copies_of_weights() -> None:
    """Each one as much; in training also gradients, and logits where the head is."""
    train, generate = workload(method="full"), workload(method=None)

    def extra(work: Workload, providers: int, *, head: bool) -> int:
        place = {"embedding": False, "head": head, "stage": 1, "stages": 2}
        found = stage_memory(work, 2, providers=providers, **place)  # type: ignore[arg-type]
        assert found.total - found.providers == stage_memory(work, 2, **place).total  # type: ignore[arg-type]
        return found.providers

    assert extra(train, 0, head=True) == 0
    assert extra(train, 2, head=False) == 2 * extra(train, 1, head=False)
    assert extra(train, 1, head=False) == PROVIDER_BYTES + 4 * 4 * train.block_parameters
    assert extra(train, 1, head=True) > extra(train, 1, head=False)
    assert extra(generate, 1, head=True) == PROVIDER_BYTES + 4 * generate.block_parameters


def test_logits_come_in_even_chunks_within_their_bytes() -> None:
    """Fewer at a time where memory is short; never so few that the head's products get slow."""
    assert head_chunk(256, 32_000, "saved") == 256
    assert head_chunk(300, 32_000, "saved") == 150
    assert head_chunk(256, 32_000, "recompute") == 64
    assert head_chunk(2048, 128_000, "recompute") == LEAST_CHUNK
    assert head_chunk(5, 128_000, "saved") == 5
    for vocabulary in (1_000, 32_000, 128_000, 262_144):
        chunk = head_chunk(100_000, vocabulary, "saved")
        assert chunk == LEAST_CHUNK or 8 * chunk * vocabulary <= HEAD_BYTES["saved"]


def test_a_head_with_a_large_vocabulary_needs_its_chunks_only() -> None:
    small, large = (workload(microbatch_size=size, vocabulary=128_000) for size in (2, 16))
    for form in ("saved", "recompute"):
        place = {"embedding": False, "head": True, "stage": 1, "stages": 2, "form": form}
        few, many = (stage_memory(w, 1, **place) for w in (small, large))  # type: ignore[arg-type]
        blocks = (stage_memory(w, 1, **place | {"head": False}) for w in (small, large))  # type: ignore[arg-type]
        grown = many.workspace - few.workspace
        assert grown == -sum(b.workspace * sign for b, sign in zip(blocks, (1, -1), strict=True))


def test_a_stage_may_use_what_it_was_granted_and_the_error_of_the_model() -> None:
    assert enforced_bytes(1_000, 5_000) == 1_100
    assert enforced_bytes(1_000, 30) == 1_030  # the device has no more
    assert enforced_bytes(1_000, 0) == enforced_bytes(1_000, -50) == 1_000


def test_a_long_prompt_goes_in_shorter_chunks() -> None:
    """So that what its scores take grows with neither."""
    assert prefill_chunk(12, 100) == prefill_chunk(12, 1_000) == 256
    for heads, length in ((12, 4_000), (32, 16_000), (32, 1_000_000)):
        chunk = prefill_chunk(heads, length)
        assert chunk == LEAST_CHUNK or 4 * heads * chunk * length <= PREFILL_BYTES
    short, long = (
        middle(workload(method=None, sequence_length=length)) for length in (2_000, 8_000)
    )
    assert long.workspace < 1.3 * short.workspace
    assert long.cache == 4 * short.cache


def test_pieces_of_a_tied_gradient_are_counted_where_the_ends_are_apart() -> None:
    def runtime(*, tied: bool, embedding: bool, head: bool) -> int:
        place = {"embedding": embedding, "head": head, "stage": 0, "stages": 1}
        return stage_memory(workload(tied=tied), 6, **place).runtime  # type: ignore[arg-type]

    together = runtime(tied=True, embedding=True, head=True)
    assert runtime(tied=True, embedding=True, head=False) > together
    assert runtime(tied=False, embedding=True, head=False) == together
