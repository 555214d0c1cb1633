"""Reading training text: a plain file is one document, a JSONL file one per record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from confidantd.errors import DataError

TEXT_FIELD = "text"
RECORD_SUFFIXES = (".jsonl", ".ndjson")
BYTE_ORDER_MARK = "\ufeff"
MAX_FIELDS_NAMED = 8


def documents(path: Path) -> Iterator[str]:
    """The documents of one file; `DataError` says what is wrong with it, and where."""
    text = _read(path)
    if not text.strip():
        raise DataError(f"{path} is empty", "give a file with text")
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
        raise DataError(
            f"{path} cannot be read ({failure.strerror})", "give readable text or JSONL files"
        ) from None


def _records(path: Path, text: str) -> Iterator[str]:
    lines = text.removeprefix(BYTE_ORDER_MARK).split("\n")  # splitlines would cut at U+2028
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON", "each line holds one JSON object") from None
    value = record.get(TEXT_FIELD) if isinstance(record, dict) else None
    if not isinstance(value, str):
        there = "there is no object"
        if isinstance(record, dict):
            names = ", ".join(sorted(record)[:MAX_FIELDS_NAMED])
            there = f"there is no field `{TEXT_FIELD}` with text (fields: {names or 'none'})"
        raise DataError(f"{where}: {there}", f"put the text of each record into `{TEXT_FIELD}`")
    if not is_unicode(value):
        raise DataError(f"{where}: a \\u escape stands for half a character")
    return value


def is_unicode(text: str) -> bool:
    """False if `text` holds a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
