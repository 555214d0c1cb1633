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
from collections.abc import Mapping
from typing import Any, TypeVar

import msgpack

from confidantd.errors import ProtocolError

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # a manifest of a 70B model's tensors is about 200 KB
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
    return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_map(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def from_map(cls: type[_T], fields: Any, _depth: int = 0) -> _T:
    """An instance of the dataclass `cls`; `ProtocolError` names the first field that is wrong."""
    if not isinstance(fields, Mapping):
        raise ProtocolError(f"{cls.__name__}: expected a map")
    if _depth > _MAX_DEPTH:
        raise ProtocolError(f"{cls.__name__}: nested too deeply")
    hints = _hints(typing.cast("Any", cls))
    unknown = set(fields) - set(hints)
    if unknown:
        raise ProtocolError(f"{cls.__name__}: unknown field {min(map(str, unknown))[:40]!r}")
    values = {}
    for field in dataclasses.fields(typing.cast("Any", cls)):
        if field.name in fields:
            where = f"{cls.__name__}.{field.name}"
            values[field.name] = _typed(hints[field.name], fields[field.name], where, _depth + 1)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ProtocolError(f"{cls.__name__}: field {field.name!r} is missing")
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _typed(hint: Any, value: Any, where: str, depth: int) -> Any:
    hint = _without_newtype(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(hint), value, where, depth)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif origin is tuple:
        return _tuple(typing.get_args(hint), value, where, depth)
    elif origin is dict and isinstance(value, Mapping):
        return _dict(typing.get_args(hint), value, where, depth)
    elif isinstance(hint, type):
        return _plain_type(hint, value, where, depth)
    elif hint is Any:
        return value
    raise ProtocolError(f"{where}: wrong value")


def _without_newtype(hint: Any) -> Any:
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    return hint


def _dict(
    hints: tuple[Any, ...], value: Mapping[Any, Any], where: str, depth: int
) -> dict[Any, Any]:
    key_hint, item_hint = hints
    return {
        _typed(key_hint, key, where, depth + 1): _typed(item_hint, item, where, depth + 1)
        for key, item in value.items()
    }


def _plain_type(hint: type[Any], value: Any, where: str, depth: int) -> Any:
    if hint is Any:  # a class since Python 3.11
        return value
    if dataclasses.is_dataclass(hint):
        return from_map(hint, value, depth)
    return _scalar(hint, value, where)


def _scalar(hint: type[Any], value: Any, where: str) -> Any:
    if issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            raise ProtocolError(f"{where}: unknown value") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ProtocolError(f"{where}: expected {hint.__name__}, got {type(value).__name__}")


def _one_of(options: tuple[Any, ...], value: Any, where: str, depth: int) -> Any:
    if value is None and type(None) in options:
        return None
    failure = ProtocolError(f"{where}: wrong value")
    for option in options:
        if option is type(None):
            continue
        try:
            return _typed(option, value, where, depth)
        except ProtocolError as caught:
            failure = caught
    raise failure


def _tuple(hints: tuple[Any, ...], value: Any, where: str, depth: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ProtocolError(f"{where}: expected a list")
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_typed(hints[0], item, where, depth + 1) for item in value)
    if len(hints) != len(value):
        raise ProtocolError(f"{where}: expected {len(hints)} items, got {len(value)}")
    return tuple(_typed(h, item, where, depth + 1) for h, item in zip(hints, value, strict=True))
