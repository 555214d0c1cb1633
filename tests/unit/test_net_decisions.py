"""Pure parts of the network: duplicates, twins, byte ranges and messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.errors import ConfidantError, ProtocolError
from confidantd.ids import DeviceId
from confidantd.net.blobs import byte_range
from confidantd.net.duplicates import InstanceLog, Origin, replaces
from confidantd.wire.codec import pack, to_map
from confidantd.wire.messages import (
    PROTOCOL_VERSION,
    Hello,
    Notify,
    Request,
    Response,
    Retire,
    clean_name,
    decode,
    decode_hello,
    encode,
)

A, B = DeviceId("a" * 64), DeviceId("b" * 64)
HELLO = Hello(PROTOCOL_VERSION, A, "name", "instance", 1, 7480, ("10.0.0.1:7480",), "0.1.0")

origins = st.builds(Origin, st.sampled_from([A, B]), st.integers(0, 3), st.just("x"))


@given(origins, origins)
def test_the_order_in_which_two_connections_come_up_does_not_matter(
    one: Origin, other: Origin
) -> None:
    if one != other:
        assert replaces(one, other) != replaces(other, one)


def test_a_restart_is_no_twin_and_a_returning_instance_is() -> None:
    log = InstanceLog()
    assert log.twin(A, "first", "x:1") is None
    assert log.twin(A, "first", "x:1") is None
    assert log.twin(A, "second", "x:2") is None
    assert log.twin(A, "first", "x:1") == "x:2"
    assert log.twin(A, "second", "x:2") == "x:1"
    assert log.twin(B, "first", "x:3") is None


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, (0, 100)),
        ("bytes=0-9", (0, 10)),
        ("bytes=90-200", (90, 100)),
        ("bytes=5-", (5, 100)),
        ("bytes=100-", None),
        ("bytes=9-5", None),
        ("bytes=-5", None),
        ("bytes=0-1,3-4", None),
        ("bytes=" + "9" * 30 + "-", None),
        ("nonsense", None),
    ],
)
def test_byte_ranges(header: str | None, part: tuple[int, int] | None) -> None:
    assert byte_range(header, 100) == part


def test_messages_come_back_as_they_were() -> None:
    for message in (
        HELLO,
        Request(1, "m", {"a": b"x", "b": [1, {"c": None}]}),
        Response(1, {}),
        Notify("topic", {"n": 1.5}),
        Retire(),
    ):
        assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_hostile_bytes_are_protocol_errors(data: bytes) -> None:
    for read in (decode, decode_hello):
        with pytest.raises(ConfidantError):
            read(data)


@pytest.mark.parametrize("change", [{"port": 0}, {"device": "x"}, {"instance": ""}, {"more": 1}])
def test_impossible_greetings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        decode_hello(pack({"type": "hello", **to_map(HELLO), **change}))


@given(st.text())
def test_names_of_strangers_are_printable_and_short(text: str) -> None:
    cleaned = clean_name(text)
    assert len(cleaned) <= 64
    assert cleaned.isprintable()
