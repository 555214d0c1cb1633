"""Signatures by this device and of others, made and checked in a process of their own.

`cryptography` takes 15 MB, and the list of members changes a few times in a device's life.
Blocking: call it in a thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confidantd.errors import IdentityError
from confidantd.wire.codec import pack, unpack

TOOL_SECONDS = 60.0  # importing `cryptography` takes seconds on a weak board
_HINT = "check that the package `cryptography` is installed and the home can be written"


@dataclass(frozen=True, slots=True)
class Claim:
    """That the owner of a certificate (PEM) has signed a text."""

    certificate: str
    text: bytes
    signature: bytes


def sign(key_path: Path, texts: Sequence[bytes]) -> list[bytes]:
    """This device's signature of each text; `IdentityError` if it cannot sign."""
    if not texts:
        return []
    answer = _asked("sign", [str(key_path)], {"texts": list(texts)})
    signatures = answer.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != len(texts):
        raise IdentityError("nothing could be signed", _HINT)
    return signatures


def check(claims: Sequence[Claim]) -> list[bool]:
    """Whether each is true; `IdentityError` if it cannot be told."""
    if not claims:
        return []
    said = [[claim.certificate, claim.text, claim.signature] for claim in claims]
    answer = _asked("check", [], {"claims": said}).get("right")
    if not isinstance(answer, list) or len(answer) != len(claims):
        raise IdentityError("signatures could not be checked", _HINT)
    return answer


def run_tool(action: str, arguments: Sequence[str], data: bytes = b"") -> bytes:
    """What `python -m confidantd.identity ACTION ...` answers; `IdentityError` says why not."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, no input of others
            [sys.executable, "-m", "confidantd.identity", action, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            input=data,
            capture_output=True,
            timeout=TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise IdentityError(f"this device's identity cannot be used ({failure})", _HINT) from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise IdentityError(f"this device's identity cannot be used ({lines[-1][:200]})", _HINT)
    return done.stdout


def _asked(action: str, arguments: Sequence[str], question: dict[str, Any]) -> dict[str, Any]:
    return unpack(run_tool(action, arguments, pack(question)))
