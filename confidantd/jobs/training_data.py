"""Token blocks of a prepared dataset: batches as the bytes that stages are fed."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Self

TOKEN_BYTES = 4
IGNORED_LABEL = (-100).to_bytes(TOKEN_BYTES, "little", signed=True)
PAD_TOKEN = bytes(TOKEN_BYTES)


class TokenBlocks:
    """Blocks of S int32 tokens in a memory-mapped file; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "dataset.json").read_text())
        self.sequence_length = int(meta["sequence_length"])
        self.count = int(meta["blocks"])
        self._block_bytes = TOKEN_BYTES * self.sequence_length
        with (folder / "tokens.bin").open("rb") as file:
            self._tokens = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()

    def digest(self) -> str:
        """SHA-256 of all tokens."""
        return hashlib.sha256(self._tokens).hexdigest()

    def batch(self, blocks: list[int]) -> bytes:
        """The blocks one after the other: int32 [len(blocks), S]."""
        return b"".join(self._block(index) for index in blocks)

    def padded(self, first: int, past_last: int, rows: int) -> tuple[bytes, bytes, int]:
        """Tokens and labels of blocks [first, past_last), filled up to a multiple of `rows`.

        The filling counts for nothing: its labels are all -100. Gives the number of
        groups of `rows` blocks too.
        """
        there = min(past_last, self.count) - first
        groups = -(-there // rows)
        filling = (groups * rows - there) * self.sequence_length
        tokens = self.batch(list(range(first, first + there)))
        return tokens + PAD_TOKEN * filling, tokens + IGNORED_LABEL * filling, groups

    def _block(self, index: int) -> bytes:
        start = index * self._block_bytes
        return self._tokens[start : start + self._block_bytes]
