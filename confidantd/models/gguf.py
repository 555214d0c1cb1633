"""The GGUF format: read a file's header, which nobody vouches for. No numpy, no tensors in memory.

A file is `GGUF`, a version, two counts, so many pairs of a key and a typed value, so many
descriptions of tensors, and from the next multiple of the alignment on the tensors' bytes. All
numbers are little endian; the first dimension of a tensor is the width of its rows.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confidantd.errors import CorruptFileError, ModelError
from confidantd.models.gguf_format import OTHER_TYPES, TYPES, GgufType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 1024 * 1024  # 128k tokens with their merges take 10 MB
MAX_ITEMS = 4_000_000  # of an array; the largest vocabularies have 256k tokens and 500k merges
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_TENSORS, MAX_KEYS = 100_000, 100_000
MAX_DIMENSIONS = 4
_TEXT, _ARRAY = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_LEAST_BYTES = {_TEXT: 8} | {kind: struct.calcsize(f"<{code}") for kind, code in _NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies in its file; rows last but one, as everywhere else."""

    name: str
    type: GgufType
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufHeader:
    """The header; `ModelError` or `CorruptFileError` with one clear line where it is unusable."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24 or file.read(4) != MAGIC:
                raise ModelError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(path, _Cursor(path, data, size), size)
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}") from None
    except OSError as failure:
        raise ModelError(f"cannot read {path} ({failure.strerror})") from None


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is damaged: {what}", "download or copy the file again")


class _Cursor:
    """Goes through the bytes of a header, and nowhere beyond them."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.size, self.at = path, min(size, MAX_HEADER_BYTES), len(MAGIC)
        self._data = data

    def take(self, count: int) -> int:
        """Where the next bytes begin."""
        start = self.at
        if count > self.size - start:
            raise _corrupt(self.path, f"its header is longer than {self.size} bytes")
        self.at += count
        return start

    def numbers(self, code: str, count: int) -> list[Any]:
        """So many numbers of a kind."""
        form = struct.Struct(f"<{count}{code}")
        return list(form.unpack_from(self._data, self.take(form.size)))

    def count(self, most: int, what: str) -> int:
        """A count that can be true."""
        (found,) = self.numbers("Q", 1)
        if found > most:
            raise _corrupt(self.path, f"its header claims {found} {what}")
        return int(found)

    def text(self) -> str:
        """A string; what is not UTF-8 is replaced."""
        length = self.count(min(MAX_TEXT_BYTES, self.size - self.at), "bytes of text")
        start = self.take(length)
        return self._data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of this type."""
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], 1)[0]
        if kind != _ARRAY:
            raise _corrupt(self.path, f"its header has a value of the unknown type {kind}")
        (inner,) = self.numbers("I", 1)
        if inner not in _LEAST_BYTES:
            raise _corrupt(self.path, f"its header has an array of the unknown type {inner}")
        room = (self.size - self.at) // _LEAST_BYTES[inner]
        length = self.count(min(MAX_ITEMS, room), "items of an array")
        if inner == _TEXT:
            return [self.text() for _ in range(length)]
        return self.numbers(_NUMBERS[inner], length)


def _header(path: Path, cursor: _Cursor, size: int) -> GgufHeader:
    (version,) = cursor.numbers("I", 1)
    if version not in VERSIONS:
        raise ModelError(
            f"{path} has version {version} of the GGUF format",
            f"supported: little endian, version {' or '.join(map(str, VERSIONS))}",
        )
    tensors, keys = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_KEYS, "values")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        (kind,) = cursor.numbers("I", 1)
        fields[key] = cursor.value(kind)
    if fields.get("split.count", 1) not in (0, 1):
        raise ModelError(
            f"{path} is one of several files of a model", "merge them: llama-gguf-split --merge"
        )
    described = [_described(path, cursor) for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise _corrupt(path, f"its alignment is {alignment!r:.20}")
    start = -(-cursor.at // alignment) * alignment
    found = {}
    for name, kind, shape, offset in described:
        found[name] = _placed(path, name, kind, shape, start + offset, size)
    return GgufHeader(path, fields, found)


def _described(path: Path, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, shape and offset of a tensor."""
    name = cursor.text()
    (dimensions,) = cursor.numbers("I", 1)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _corrupt(path, f"{name!r:.80} has {dimensions} dimensions")
    sizes = cursor.numbers("Q", dimensions)
    if any(not 1 <= size < 1 << 40 for size in sizes):
        raise _corrupt(path, f"the shape of {name!r:.80} is not valid")
    (kind,) = cursor.numbers("I", 1)
    (offset,) = cursor.numbers("Q", 1)
    return name, kind, tuple(reversed(sizes)), offset


def _placed(
    path: Path, name: str, number: int, shape: tuple[int, ...], offset: int, size: int
) -> GgufTensor:
    kind = TYPES.get(number)
    if kind is None:
        raise ModelError(
            f"{path}: {name!r:.80} has the type {OTHER_TYPES.get(number, number)}, "
            "which is not read",
            f"supported: {', '.join(known.name for known in TYPES.values())}",
        )
    if shape[-1] % kind.block:
        raise _corrupt(path, f"{name!r:.80} of type {kind.name} has shape {list(shape)}")
    bytes_ = kind.size(shape)
    if offset + bytes_ > size:
        raise _corrupt(path, f"{name!r:.80} ends at byte {offset + bytes_}, the file at {size}")
    return GgufTensor(name, kind, shape, offset, bytes_)
