"""Data-plane frames: a msgpack header and the raw bytes of one tensor.

Layout of a binary message: header length (4 bytes, big endian), header (msgpack
map), payload (the tensor in C order, little endian). Every frame names its job,
epoch, step and microbatch; a receiver refuses what is not of its own job and epoch.
"""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass

from confidantd.errors import ProtocolError
from confidantd.ids import JobId
from confidantd.wire.codec import from_map, pack, to_map, unpack
from confidantd.wire.passes import Pass

MAX_HEADER_BYTES = 4_096
_LENGTH = struct.Struct(">I")
_ITEM_BYTES = {"float32": 4, "float64": 8, "int32": 4, "int64": 8}


class FrameKind(enum.Enum):
    """What a frame carries."""

    HELLO = "hello"  # first frame on a link: who dialled (no payload)
    CREDIT = "credit"  # some frames of that link were used: as many may come (no payload)
    ACTIVATION = "activation"  # forward, [b, S, D]
    GRADIENT = "gradient"  # backward, [b, S, D]
    TIED_GRADIENT = "tied-gradient"  # [V, D], between the two ends of a tied embedding
    SQUARE_SUM = "square-sum"  # partial squared gradient norm, towards stage 0
    SQUARE_TOTAL = "square-total"  # the whole squared norm, from stage 0 on
    HIDDEN = "hidden"  # generation, [b, T, D]
    TOKEN = "token"  # noqa: S105 - generation, what the head chose, to stage 0: [b, 1 + n]


@dataclass(frozen=True, slots=True)
class Frame:
    """Header of one frame; `stage` is the sender. In generation `step` is the number of the pass,
    and a hidden state says of which sequences it is.
    """

    job: JobId
    epoch: int
    kind: FrameKind
    stage: int
    step: int
    microbatch: int
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    of: Pass | None = None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensor that the header promises."""
        if self.kind in (FrameKind.HELLO, FrameKind.CREDIT):
            return 0
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; `ProtocolError` for an unknown dtype or a negative size."""
    if dtype not in _ITEM_BYTES:
        raise ProtocolError(f"a frame has the unknown dtype {dtype[:20]!r}")
    if any(size < 0 for size in shape):
        raise ProtocolError("a frame has a negative size")
    return _ITEM_BYTES[dtype] * math.prod(shape)


def encode_frame(frame: Frame, payload: bytes | memoryview = b"") -> bytes:
    """The message to send for `frame` and its tensor bytes."""
    if len(payload) != frame.payload_bytes:
        raise ProtocolError(
            f"a frame promises {frame.payload_bytes} bytes and carries {len(payload)}"
        )
    header = pack(to_map(frame))
    return b"".join((_LENGTH.pack(len(header)), header, payload))


def decode_frame(message: bytes) -> tuple[Frame, memoryview]:
    """Header and payload (a view into `message`); `ProtocolError` if it is not a frame."""
    view = memoryview(message)
    if len(view) < _LENGTH.size:
        raise ProtocolError("a frame is shorter than its length field")
    (header_bytes,) = _LENGTH.unpack(view[: _LENGTH.size])
    if header_bytes > MAX_HEADER_BYTES:
        raise ProtocolError(f"a frame header of {header_bytes} bytes is over the limit")
    payload = view[_LENGTH.size + header_bytes :]
    frame = from_map(Frame, unpack(view[_LENGTH.size : _LENGTH.size + header_bytes]))
    if len(payload) != frame.payload_bytes:
        raise ProtocolError(
            f"a frame promises {frame.payload_bytes} bytes and carries {len(payload)}"
        )
    return frame, payload
