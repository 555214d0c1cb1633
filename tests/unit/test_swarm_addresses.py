"""Addresses: parsing, remembering, and which interfaces and announcements are believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confidantd.discovery.announcement import Announcement, from_txt, to_txt
from confidantd.discovery.interfaces import choose_addresses, usable_addresses
from confidantd.ids import DeviceId
from confidantd.swarm.addresses import AddressBook, format_address, parse_address

A = DeviceId("a" * 64)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:7480", ("10.0.0.1", 7480)),
        ("laptop.local:1", ("laptop.local", 1)),
        ("[fe80::1]:80", ("fe80::1", 80)),
        ("fe80::1:80", None),
        ("10.0.0.1", None),
        ("10.0.0.1:0", None),
        ("10.0.0.1:65536", None),
        ("a/b:80", None),
        (":80", None),
        ("x:٣", None),
    ],
)
def test_addresses_are_read_strictly(text: str, address: tuple[str, int] | None) -> None:
    assert parse_address(text) == address


@given(st.from_regex(r"[a-z0-9.]{1,20}|[0-9a-f:]{3,20}", fullmatch=True), st.integers(1, 65_535))
def test_formatting_is_the_inverse_of_parsing(host: str, port: int) -> None:
    assert parse_address(format_address(host, port)) == (host, port)


def test_a_book_keeps_proven_addresses_first_and_few() -> None:
    book = AddressBook()
    assert book.put_last(A, [f"10.0.0.{i}:1" for i in range(1, 20)])
    assert len(book.get(A)) == 8
    assert not book.put_last(A, ["10.0.0.99:1"])
    assert book.put_first(A, ["10.0.0.99:1", "nonsense"])
    assert book.get(A)[0] == "10.0.0.99:1"
    assert len(book.get(A)) == 8
    assert not book.put_first(A, ["10.0.0.99:1"])
    book.drop(A, "10.0.0.99:1")
    assert "10.0.0.99:1" not in book.get(A)


def test_a_book_survives_its_file_and_a_damaged_one() -> None:
    book = AddressBook()
    book.put_first(A, ["10.0.0.1:1"])
    book.set_name(A, "kitchen\x07 board")
    again = AddressBook.from_json(book.to_json([A]))
    assert (again.get(A), again.name(A)) == (("10.0.0.1:1",), "kitchen board")
    several: list[object] = [None, [], {"x": {}}, {A: 3}, {A: {"addresses": 4}}]
    for damaged in [*several, {A: {"addresses": [{}]}}]:
        assert AddressBook.from_json(damaged).get(A) == ()


def test_containers_and_tunnels_are_no_interfaces_and_loopback_is_the_last_resort() -> None:
    lo, wifi = ("lo", "127.0.0.1"), ("wlan0", "192.168.1.5")
    virtual = [(name, "172.17.0.1") for name in ("docker0", "br-1a", "veth9", "wg0", "tailscale0")]
    assert choose_addresses([lo, *virtual, wifi]) == ("192.168.1.5",)
    assert choose_addresses([lo, *virtual]) == ("127.0.0.1",)
    assert choose_addresses([]) == ()
    six = [("wlan0", "fe80::1"), ("wlan0", "2001:db8::1")]
    assert choose_addresses([*six, wifi]) == ("192.168.1.5",)
    assert choose_addresses([*six, wifi], ipv6=True) == ("192.168.1.5", "2001:db8::1")
    assert usable_addresses(["127.0.0.1"]) == ("127.0.0.1",)


def test_an_announcement_comes_through_and_a_hostile_one_is_made_harmless() -> None:
    own = Announcement(A, "Ännas laptop", "tag", ("10.0.0.1",), 7480, "1", "instance", "digest")
    txt = {key.encode(): value.encode() for key, value in to_txt(own).items()}
    assert from_txt(txt, ["10.0.0.1"], 7480) == own
    hostile = from_txt({**txt, b"name": b"\x1b[31m" + b"x" * 300 + b"\xff"}, ["10.0.0.1"], 1)
    assert hostile is not None
    assert hostile.name.isprintable()
    assert len(hostile.name) <= 64
    assert from_txt({**txt, b"id": b"A" * 64}, [], 1) is None
    assert from_txt(txt, [], 0) is None
    assert from_txt({}, [], 1) is None
