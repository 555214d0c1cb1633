"""A program's manifest: what goes in and comes out, as JSON in the program's metadata."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

MANIFEST_KEY = "confidant.manifest"
MAX_MANIFEST_CHARACTERS = 1024 * 1024
MAX_SIZE = 1 << 40
_FREE = re.compile(r"(?:[1-9][0-9]{0,8}\*)?[A-Za-z_][A-Za-z0-9_]{0,31}")  # `K` or `64*K`


@dataclass(frozen=True, slots=True)
class ManifestPort:
    """An input or output: its name, and its sizes, of which a text is left open."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Of one program."""

    program: str
    inputs: tuple[ManifestPort, ...]
    outputs: tuple[ManifestPort, ...]

    @property
    def free_dimensions(self) -> frozenset[str]:
        """Names of the sizes that are left open."""
        ports = (*self.inputs, *self.outputs)
        return frozenset(size for port in ports for size in port.shape if isinstance(size, str))


def read_manifest(text: str) -> Manifest:
    """The manifest in a text that anybody may have written; `ValueError` if it is none."""
    if len(text) > MAX_MANIFEST_CHARACTERS:
        raise ValueError("its manifest is too long")
    try:
        match json.loads(text):
            case {"program": str(program), "inputs": list(inputs), "outputs": list(outputs)}:
                return Manifest(program, _ports(inputs), _ports(outputs))
    except (ValueError, RecursionError):
        pass
    raise ValueError("its manifest is damaged")


def _ports(entries: list[Any]) -> tuple[ManifestPort, ...]:
    return tuple(_port(entry) for entry in entries)


def _port(entry: Any) -> ManifestPort:
    match entry:
        case {"name": str(name), "shape": list(shape)} if all(_is_size(size) for size in shape):
            return ManifestPort(name, tuple(shape))
    raise ValueError("a port is damaged")


def _is_size(size: Any) -> bool:
    if isinstance(size, str):
        return _FREE.fullmatch(size) is not None
    return type(size) is int and 0 <= size < MAX_SIZE
