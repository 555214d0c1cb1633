"""Identifiers that cannot be mixed up: each is a `str` with a type of its own."""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import NewType

DeviceId = NewType("DeviceId", str)  # SHA-256 of the device's certificate (DER), 64 hex digits
JobId = NewType("JobId", str)  # 12 hex digits, made by the owner
Digest = NewType("Digest", str)  # SHA-256 of some bytes, 64 hex digits

_DIGEST_CHARACTERS = 64
_JOB_CHARACTERS = 12
_HEX = frozenset("0123456789abcdef")


def is_digest(text: str) -> bool:
    """True for 64 lower-case hex digits: a device id or a content digest."""
    return len(text) == _DIGEST_CHARACTERS and _HEX.issuperset(text)


def digest_of(data: bytes | memoryview) -> Digest:
    """SHA-256 of `data` in hex."""
    return Digest(hashlib.sha256(data).hexdigest())


def is_job_id(text: str) -> bool:
    """True for 12 lower-case hex digits: safe as a part of a path."""
    return len(text) == _JOB_CHARACTERS and _HEX.issuperset(text)


def new_job_id() -> JobId:
    """A fresh random job id (48 bits)."""
    return JobId(secrets.token_hex(_JOB_CHARACTERS // 2))


def short_id(device: DeviceId) -> str:
    """Eight base-32 characters of the id and two check characters: `ABCD-EFGH-XY`.

    The check characters are a hash of the first eight, so that a misread or
    mistyped character shows.
    """
    head = base64.b32encode(bytes.fromhex(device)[:5]).decode()
    check = base64.b32encode(hashlib.sha256(head.encode()).digest()).decode()[:2]
    return f"{head[:4]}-{head[4:]}-{check}"
