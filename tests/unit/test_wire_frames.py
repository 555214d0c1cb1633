"""Frames survive the wire, and nothing else passes for one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import ProtocolError
from confidantd.ids import JobId
from confidantd.wire.codec import pack, to_map
from confidantd.wire.frames import Frame, FrameKind, decode_frame, encode_frame

FRAME = Frame(JobId("a1"), 3, FrameKind.ACTIVATION, 1, 7, 2, "float32", (2, 3))
PAYLOAD = bytes(range(24))


def test_a_frame_comes_back() -> None:
    frame, payload = decode_frame(encode_frame(FRAME, PAYLOAD))
    assert frame == FRAME
    assert bytes(payload) == PAYLOAD


@pytest.mark.parametrize("kind", [FrameKind.HELLO, FrameKind.CREDIT])
def test_some_frames_have_no_payload(kind: FrameKind) -> None:
    frame = Frame(JobId("a1"), 3, kind, 1, 0, 0)
    assert decode_frame(encode_frame(frame))[0] == frame


def test_a_payload_of_another_size_is_refused() -> None:
    with pytest.raises(ProtocolError, match="promises 24 bytes"):
        encode_frame(FRAME, PAYLOAD[:-1])
    with pytest.raises(ProtocolError, match="promises 24 bytes"):
        decode_frame(encode_frame(FRAME, PAYLOAD)[:-1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "object"), ("shape", [-1, 3]), ("kind", "exec"), ("epoch", "3"), ("extra", 1)],
)
def test_a_wrong_field_is_refused(field: str, value: object) -> None:
    header = pack({**to_map(FRAME), field: value})
    with pytest.raises(ProtocolError):
        decode_frame(struct.pack(">I", len(header)) + header + PAYLOAD)


def test_an_oversized_header_is_refused() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        decode_frame(struct.pack(">I", 1_000_000) + b"x" * 100)


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(message)


@given(st.data())
def test_a_damaged_frame_is_refused_or_still_consistent(data: st.DataObject) -> None:
    message = bytearray(encode_frame(FRAME, PAYLOAD))
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] = data.draw(st.integers(0, 255))
    try:
        frame, payload = decode_frame(bytes(message))
    except ProtocolError:
        return
    assert len(payload) == frame.payload_bytes
