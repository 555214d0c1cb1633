"""Which blocks of the data each step trains on: a function of the seed and the step only."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from confidantd.errors import DataError


def steps_per_epoch(blocks: int, batch_size: int) -> int:
    """Whole batches in one pass over the data; the rest of the pass is dropped."""
    return blocks // batch_size


@dataclass(frozen=True)
class BlockOrder:
    """Batches of `batch_size` blocks. Each epoch has an order of its own, unless not shuffled.

    As a torch `DataLoader(drop_last=True)`: blocks that do not fill the last batch of
    an epoch wait for another epoch.
    """

    blocks: int
    batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.blocks < self.batch_size:
            raise DataError(
                f"the data has {self.blocks} blocks, fewer than one batch of {self.batch_size}",
                "give more text, or lower --batch-size or --sequence-length",
            )

    def batch(self, step: int) -> list[int]:
        """Block numbers of a step, counted from 0."""
        epoch, place = divmod(step, steps_per_epoch(self.blocks, self.batch_size))
        first = place * self.batch_size
        if not self.shuffle:
            return list(range(first, first + self.batch_size))
        return list(shuffled(self.blocks, self.seed, epoch)[first : first + self.batch_size])


@functools.lru_cache(maxsize=2)  # the epoch at work and the one that is fed ahead
def shuffled(blocks: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation: block numbers sorted by SHA-256 of `seed:epoch:number`.

    Any language and any version of Python gives the same one.
    """
    return tuple(
        sorted(
            range(blocks),
            key=lambda block: hashlib.sha256(f"{seed}:{epoch}:{block}".encode()).digest(),
        )
    )
