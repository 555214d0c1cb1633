"""What a device measured of itself for blocks of one shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds of one microbatch (training) or one token (generation).

    `forward` and `backward` are one block's in the saved form, `forward_again` and
    `backward_again` in the recompute form. `head` is both passes of the model's head,
    None where there was no memory to measure it; `embedding` both of the embedding.
    `update` is AdamW's seconds per trained parameter. `message` is what sending or receiving
    an activation takes from what the device computes. Generation has forwards only.
    """

    forward: float
    backward: float = 0.0
    forward_again: float = 0.0
    backward_again: float = 0.0
    head: float | None = None
    embedding: float = 0.0
    update: float = 0.0
    message: float = 0.0
