"""Reading training text: a plain file is one document, a JSONL file one per record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from confidantd.errors import DataError

TEXT_FIELD = "text"
RECORD_SUFFIXES = (".jsonl", ".ndjson")


def documents(path: Path) -> Iterator[str]:
    """The documents of one file; `DataError` says what is wrong with it, and where."""
    text = _read(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    if path.suffix.lower() in RECORD_SUFFIXES:
        yield from _records(path, text)
    else:
        yield text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as failure:
        raise DataError(
            f"{path} is not UTF-8 text (byte {failure.start})",
            "convert it, for example with iconv -t UTF-8",
        ) from None
    except OSError as failure:
        raise DataError(f"{path} cannot be read ({failure.strerror})") from None


def _records(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise DataError(f"{path}, line {number}: not JSON") from None
        value = record.get(TEXT_FIELD) if isinstance(record, dict) else None
        if not isinstance(value, str):
            there = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else "no object"
            raise DataError(
                f"{path}, line {number}: there is no field `{TEXT_FIELD}` with text "
                f"(fields: {there})",
                f"put the text of each record into `{TEXT_FIELD}`",
            )
        yield value
