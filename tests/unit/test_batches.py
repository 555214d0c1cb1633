"""Batches: a function of seed and step, every block once an epoch, the rest dropped."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import DataError
from confidantd.jobs.batches import BlockOrder, shuffled, steps_per_epoch

SIZES = st.integers(1, 40).flatmap(
    lambda blocks: st.tuples(st.just(blocks), st.integers(1, blocks))
)


@given(sizes=SIZES, seed=st.integers(0, 2**63), epoch=st.integers(0, 5), shuffle=st.booleans())
def test_an_epoch_takes_no_block_twice(
    sizes: tuple[int, int], seed: int, epoch: int, shuffle: bool
) -> None:
    blocks, batch_size = sizes
    order = BlockOrder(blocks, batch_size, seed, shuffle)
    steps = steps_per_epoch(blocks, batch_size)
    batches = [order.batch(epoch * steps + place) for place in range(steps)]
    taken = [block for batch in batches for block in batch]
    assert all(len(batch) == batch_size for batch in batches)
    assert len(set(taken)) == len(taken) == blocks - blocks % batch_size
    assert set(taken) <= set(range(blocks))


@given(sizes=SIZES, step=st.integers(0, 200))
def test_a_step_is_the_same_in_whatever_order_steps_are_asked(
    sizes: tuple[int, int], step: int
) -> None:
    order = BlockOrder(*sizes, seed=3, shuffle=True)
    wanted = order.batch(step)
    shuffled.cache_clear()
    order.batch(step + 1)
    assert order.batch(step) == wanted


def test_file_order_drops_what_does_not_fill_a_batch_as_a_data_loader_does() -> None:
    from torch.utils.data import DataLoader

    order = BlockOrder(blocks=7, batch_size=3, seed=0, shuffle=False)
    theirs = [batch.tolist() for batch in DataLoader(range(7), batch_size=3, drop_last=True)]
    assert [order.batch(step) for step in range(5)] == [*theirs, *theirs, theirs[0]]


def test_the_documented_permutation() -> None:
    """Sorted by SHA-256 of `seed:epoch:number`: anybody can compute it again."""
    expected = sorted(range(5), key=lambda b: hashlib.sha256(f"42:1:{b}".encode()).hexdigest())
    assert list(shuffled(5, 42, 1)) == expected
    assert BlockOrder(5, 2, seed=42, shuffle=True).batch(3) == expected[2:4]
    assert shuffled(50, 42, 0) != shuffled(50, 42, 1)
    assert shuffled(50, 42, 0) != shuffled(50, 43, 0)


def test_fewer_blocks_than_a_batch_names_both() -> None:
    with pytest.raises(DataError, match=r"3 blocks, fewer than one batch of 4") as failure:
        BlockOrder(blocks=3, batch_size=4, seed=0, shuffle=True)
    assert "--batch-size" in failure.value.hint
