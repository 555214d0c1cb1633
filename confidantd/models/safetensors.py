"""The safetensors format: read a header, write a file. No numpy, no tensors in memory.

A file is a header length (8 bytes, little endian), a JSON header
`{name: {"dtype", "shape", "data_offsets"}}`, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from confidantd.errors import CorruptFileError, ModelError, StorageError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 8
_LENGTH = struct.Struct("<Q")
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor lies: `bytes` at `offset` of `file`, C order."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to write; `data` is its bytes, or a file or place in a file that holds them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | Path | TensorLocation

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorLocation]:
    """The tensors of a file; `CorruptFileError` if header and file size do not fit."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _header(path, file, size)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "download the model again") from None
    except OSError as failure:
        raise ModelError(f"cannot read {path} ({failure.strerror})") from None
    found = {
        name: _location(path, name, entry, start, size - start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_no_overlap(path, found.values())
    return found


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is damaged: {what}", "download or copy the file again")


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise _corrupt(path, f"it has only {size} bytes")
    (length,) = _LENGTH.unpack(prefix)
    if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
        raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise _corrupt(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return header, _LENGTH.size + length


def _location(path: Path, name: str, entry: Any, start: int, room: int) -> TensorLocation:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(first), int(past)],
        }:
            pass
        case _:
            raise _corrupt(path, f"the header entry of {name!r:.80} is not valid")
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{path}: {name!r:.80} has the unknown dtype {dtype!r:.20}")
    dimensions = all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    if not dimensions or len(shape) > MAX_DIMENSIONS:
        raise _corrupt(path, f"the shape of {name!r:.80} is not valid")
    if not 0 <= first <= past:
        raise _corrupt(path, f"the offsets of {name!r:.80} are not valid")
    if past > room:
        raise _corrupt(path, f"{name!r:.80} ends at byte {past}, the file's data at {room}")
    if past - first != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _corrupt(path, f"{name!r:.80} has {past - first} bytes, its shape needs others")
    return TensorLocation(path, dtype, tuple(shape), start + first, past - first)


def _check_no_overlap(path: Path, locations: Iterable[TensorLocation]) -> None:
    end = 0
    for location in sorted(locations, key=lambda where: (where.offset, where.bytes)):
        if location.offset < end:
            raise _corrupt(path, "two of its tensors overlap")
        end = location.offset + location.bytes


def write_file(path: Path, pieces: Sequence[Piece]) -> int:
    """Write a file and flush it to disk; gives its size. Streams: no tensor is held whole.

    `StorageError` if that fails; the caller renames a finished file into its place.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        offsets = [end, end + piece.bytes]
        entry = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": offsets,
        }
        header[piece.name] = entry
        end += piece.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    try:
        with path.open("wb") as file:
            file.write(_LENGTH.pack(len(text)) + text)
            for piece in pieces:
                _copy(piece, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        raise StorageError(
            f"cannot write {path} ({failure.strerror})", "free some disk space"
        ) from None
    return _LENGTH.size + len(text) + end


def _copy(piece: Piece, target: BinaryIO) -> None:
    if isinstance(piece.data, bytes):
        written = target.write(piece.data)
    elif isinstance(piece.data, Path):
        written = _copy_range(piece.data, 0, piece.bytes, target)
    else:
        written = _copy_range(piece.data.file, piece.data.offset, piece.bytes, target)
    if written != piece.bytes:
        raise CorruptFileError(f"{piece.name}: {written} bytes where {piece.bytes} are needed")


def _copy_range(path: Path, offset: int, size: int, target: BinaryIO) -> int:
    copied = 0
    with path.open("rb") as source:
        source.seek(offset)
        while chunk := source.read(min(_COPY_BYTES, size - copied)):
            copied += target.write(chunk)
    return copied
