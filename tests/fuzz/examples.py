"""A valid instance of every dataclass that travels, made from its types."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

_LEAVES: dict[Any, Any] = {
    int: 1, float: 1.5, str: "ab" * 32, bytes: b"bytes", bool: True, type(None): None, Any: "any",
}  # fmt: skip


def example(hint: Any) -> Any:
    """An instance of a type, as the wire's codec takes it."""
    hint = getattr(hint, "__supertype__", hint)  # a NewType
    if hint in _LEAVES:
        return _LEAVES[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{f.name: example(hints[f.name]) for f in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint))
    return _of_many(hint, typing.get_args(hint))


def _of_many(hint: Any, options: tuple[Any, ...]) -> Any:
    """Of a type with arguments."""
    match typing.get_origin(hint):
        case typing.Literal:
            return options[0]
        case types.UnionType | typing.Union:
            return example(options[0])
        case origin if origin is tuple:
            return tuple(example(o) for o in options if o is not Ellipsis)
        case origin if origin is list:
            return [example(options[0])]
        case _:
            return {example(options[0]): example(options[1])} if options else {}
