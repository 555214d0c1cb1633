"""Frozen dataclasses to and from msgpack maps, checked field by field.

Bytes from a peer are hostile: `decode` refuses unknown or missing fields, wrong
types, too deep nesting and oversized input with a `ProtocolError`, and never
allocates more than the input's own size.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgpack

from confidantd.errors import ProtocolError

MAX_MESSAGE_BYTES = 8 * 1024 * 1024  # a manifest of a 70B model's tensors is about 200 KB
_MAX_DEPTH = 12

_T = TypeVar("_T")


def pack(fields: Mapping[str, Any]) -> bytes:
    """A msgpack map."""
    return typing.cast("bytes", msgpack.packb(fields, use_bin_type=True))


def unpack(data: bytes | memoryview, *, max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Any]:
    """The msgpack map in `data`; `ProtocolError` if it is anything else."""
    if len(data) > max_bytes:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {max_bytes}")
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as failure:
        raise ProtocolError(f"a message is not valid msgpack ({type(failure).__name__})") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError("a message is not a map")
    return value


def to_map(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, nested dataclasses and enums turned into plain values."""
    return {name: _plain(getattr(value, name)) for name in _field_names(value.__class__)}


_ATOMS = frozenset({int, float, str, bytes, bool, type(None)})


def _plain(value: Any) -> Any:
    if value.__class__ in _ATOMS:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_map(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


@functools.cache
def _field_names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def from_map(cls: type[_T], fields: Any, _depth: int = 0) -> _T:
    """An instance of the dataclass `cls`; `ProtocolError` names the first field that is wrong."""
    if not isinstance(fields, Mapping):
        raise ProtocolError(f"{cls.__name__}: expected a map")
    if _depth > _MAX_DEPTH:
        raise ProtocolError(f"{cls.__name__}: nested too deeply")
    readers = _readers(typing.cast("Any", cls))
    if not fields.keys() <= readers.keys():
        unknown = min(map(str, set(fields) - set(readers)))
        raise ProtocolError(f"{cls.__name__}: unknown field {unknown[:40]!r}")
    values = {}
    for name, (read, required) in readers.items():
        if name in fields:
            values[name] = read(fields[name], _depth + 1)
        elif required:
            raise ProtocolError(f"{cls.__name__}: field {name!r} is missing")
    return cls(**values)


# Frames and messages are read all the time, so what a type asks of a value is worked out once:
# a reader takes a value and how deep it stands, and gives what the field holds.
_Reader = Callable[[Any, int], Any]


@functools.cache
def _readers(cls: Any) -> dict[str, tuple[_Reader, bool]]:
    """For each field its reader, and whether it must be there."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        defaults = (field.default, field.default_factory)
        required = all(default is dataclasses.MISSING for default in defaults)
        found[field.name] = _reader(hints[field.name], f"{cls.__name__}.{field.name}"), required
    return found


def _reader(hint: Any, where: str) -> _Reader:
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    origin = typing.get_origin(hint)
    if origin in _GENERIC:
        return _GENERIC[origin](typing.get_args(hint), where)
    if hint is Any:
        return lambda value, _: value
    if dataclasses.is_dataclass(hint):
        return functools.partial(from_map, typing.cast("type[Any]", hint))
    if isinstance(hint, type):
        return _enum(hint, where) if issubclass(hint, enum.Enum) else _scalar(hint, where)
    raise TypeError(f"{where}: no message can carry {hint}")


def _literal(options: tuple[Any, ...], where: str) -> _Reader:
    def read(value: Any, _: int) -> Any:
        if value in options:
            return value
        raise ProtocolError(f"{where}: wrong value")

    return read


def _enum(cls: type[enum.Enum], where: str) -> _Reader:
    def read(value: Any, _: int) -> Any:
        try:
            return cls(value)
        except ValueError:
            raise ProtocolError(f"{where}: unknown value") from None

    return read


def _scalar(cls: type[Any], where: str) -> _Reader:
    def read(value: Any, _: int) -> Any:
        if value.__class__ is cls:
            return value
        if cls is float and value.__class__ is int:
            return float(value)
        raise ProtocolError(f"{where}: expected {cls.__name__}, got {type(value).__name__}")

    return read


def _dict(options: tuple[Any, ...], where: str) -> _Reader:
    read_key, read_item = (_reader(option, where) for option in options)

    def read(value: Any, depth: int) -> Any:
        if not isinstance(value, Mapping):
            raise ProtocolError(f"{where}: wrong value")
        return {read_key(k, depth + 1): read_item(item, depth + 1) for k, item in value.items()}

    return read


def _one_of(options: tuple[Any, ...], where: str) -> _Reader:
    readers = [_reader(option, where) for option in options if option is not type(None)]
    optional = type(None) in options

    def read(value: Any, depth: int) -> Any:
        if value is None and optional:
            return None
        failure = ProtocolError(f"{where}: wrong value")
        for one in readers:
            try:
                return one(value, depth)
            except ProtocolError as caught:
                failure = caught
        raise failure

    return read


def _tuple(options: tuple[Any, ...], where: str) -> _Reader:
    if len(options) == 2 and options[1] is Ellipsis:
        return _list(_reader(options[0], where), where)
    readers = [_reader(option, where) for option in options]

    def read(value: Any, depth: int) -> Any:
        if not isinstance(value, tuple | list):
            raise ProtocolError(f"{where}: expected a list")
        if len(readers) != len(value):
            raise ProtocolError(f"{where}: expected {len(readers)} items, got {len(value)}")
        return tuple(one(item, depth + 1) for one, item in zip(readers, value, strict=True))

    return read


def _list(read_item: _Reader, where: str) -> _Reader:
    def read(value: Any, depth: int) -> Any:
        if not isinstance(value, tuple | list):
            raise ProtocolError(f"{where}: expected a list")
        return tuple(read_item(item, depth + 1) for item in value)

    return read


_GENERIC: Mapping[Any, Callable[[tuple[Any, ...], str], _Reader]] = {
    typing.Union: _one_of,
    types.UnionType: _one_of,
    typing.Literal: _literal,
    tuple: _tuple,
    dict: _dict,
}
