"""Messages of the control connection between two daemons, and their bytes.

A message is a msgpack map: its fields and `"type"`. The first one each way is `Hello`;
then requests with their answers, and notifications.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from confidantd.errors import ConfidantError, ProtocolError, from_wire
from confidantd.ids import DeviceId, is_digest
from confidantd.wire.codec import from_map, pack, to_map, unpack
from confidantd.wire.links import Link
from confidantd.wire.resources import Resources

PROTOCOL_VERSION = 5
MAX_HELLO_BYTES = 16 * 1024
MAX_NAME_CHARACTERS = 64
MAX_ADDRESSES = 16
MAX_INSTANCE_CHARACTERS = 32
MAX_TERM = 2**48  # far beyond any real election; a hostile one cannot overflow a reader


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is there. `instance` is random per start of a daemon; `attempt` counts its dials.

    `port` is where this device listens and `addresses` where, as it knows itself.
    """

    protocol: int
    device: DeviceId
    name: str
    instance: str
    attempt: int
    port: int
    addresses: tuple[str, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The answer to a `Hello` that cannot be served: an error as in `errors`."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Request:
    """A call; `id` is unique per connection and direction."""

    id: int
    method: str
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Response:
    """The result of a request."""

    id: int
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """The error that a request ended with."""

    id: int
    code: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Notify:
    """A message that wants no answer."""

    topic: str
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Retire:
    """The sender sends nothing more here: another connection of this pair is kept instead."""


Message = Hello | Refused | Request | Response | Failure | Notify | Retire

_TYPES: dict[str, type[Message]] = {
    "hello": Hello,
    "refused": Refused,
    "request": Request,
    "response": Response,
    "failure": Failure,
    "notify": Notify,
    "retire": Retire,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}


def encode(message: Message) -> bytes:
    """The bytes of one message. `params` and `result` are packed as they are."""
    return pack({"type": _NAMES[type(message)], **_fields(message)})


def decode(data: bytes) -> Message:
    """The message in `data`; `ProtocolError` if it is none."""
    fields = unpack(data)
    cls = _TYPES.get(str(fields.pop("type", "")))
    if cls is None:
        raise ProtocolError("a message of unknown type")
    return from_map(cls, fields)


def decode_hello(data: bytes) -> Hello:
    """The other side's `Hello`. Raises what it refused us with, or `ProtocolError`.

    The protocol version is compared before anything else is read, so that two releases
    that differ in fields still understand why they cannot talk.
    """
    fields = unpack(data, max_bytes=MAX_HELLO_BYTES)
    kind = fields.pop("type", None)
    if kind == "refused":
        raise from_wire(fields)
    if kind != "hello":
        raise ProtocolError("the first message is not a greeting")
    theirs = fields.get("protocol")
    if theirs != PROTOCOL_VERSION:
        raise version_mismatch(theirs, fields.get("version"))
    hello = from_map(Hello, fields)
    if not _plausible(hello):
        raise ProtocolError("a greeting with impossible values")
    return hello


def version_mismatch(theirs: object, release: object) -> ProtocolError:
    """Two devices run releases that cannot talk to each other."""
    number = theirs if isinstance(theirs, int) else "?"
    name = clean_name(str(release)) or "unknown"
    return ProtocolError(
        f"the other device (release {name}) speaks protocol {number}, "
        f"this one protocol {PROTOCOL_VERSION}",
        "install the same release of confidantd on both",
    )


def refusal(failure: ConfidantError) -> Refused:
    """The message that tells the other side about `failure`."""
    return Refused(**failure.to_wire())


def clean_name(text: str) -> str:
    """At most 64 printable characters: what a stranger calls itself is not trusted."""
    return clean_text(text, MAX_NAME_CHARACTERS)


def clean_text(text: str, most: int) -> str:
    """One line of printable characters, at most so many."""
    printable = "".join(c for c in text[: 4 * most] if c.isprintable())
    return " ".join(printable.split())[:most]


def _fields(message: Message) -> Mapping[str, Any]:
    match message:
        case Request(id_, method, params):
            return {"id": id_, "method": method, "params": params}
        case Response(id_, result):
            return {"id": id_, "result": result}
        case Notify(topic, params):
            return {"topic": topic, "params": params}
        case _:
            return to_map(message)


def _plausible(hello: Hello) -> bool:
    return (
        is_digest(hello.device)
        and 0 < hello.port < 65_536
        and 0 < len(hello.instance) <= MAX_INSTANCE_CHARACTERS
        and len(hello.addresses) <= MAX_ADDRESSES
    )


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """Who should coordinate: compared field by field, the greater the better."""

    compiler: bool = False
    mains: bool = False
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """A coordinator's own words, passed on unchanged by those who follow it.

    `pulse` grows with every heartbeat of the coordinator; `followed`: someone follows it.
    """

    coordinator: DeviceId
    term: int
    pulse: int
    followed: bool
    rank: Rank


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat to one peer.

    `term` is the highest the sender has seen, `claim` that of the coordinator it follows
    (itself included), `heard` the devices it hears directly. `echo` is the last `sequence`
    it got from the receiver and `echo_held_seconds` how long ago. `resources`,
    `addresses` (`host:port` texts by device) and `links` (what the sender measured, by device)
    come only every few beats.
    """

    sequence: int
    term: int
    rank: Rank
    heard: tuple[DeviceId, ...]
    claim: Claim | None = None
    echo: int | None = None
    echo_held_seconds: float = 0.0
    resources: Resources | None = None
    addresses: dict[DeviceId, tuple[str, ...]] = field(default_factory=dict)
    links: dict[DeviceId, Link] = field(default_factory=dict)
