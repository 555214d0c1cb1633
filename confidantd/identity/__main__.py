"""`python -m confidantd.identity create FOLDER | sign KEY | check`: what needs `cryptography`.

`sign` and `check` read a question from stdin and write the answer to stdout (msgpack).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from confidantd.errors import ConfidantError
from confidantd.identity.certificate import CERTIFICATE_NAME, KEY_NAME
from confidantd.identity.create import create_identity
from confidantd.identity.signatures import check_all, sign_all
from confidantd.identity.signing import Claim
from confidantd.wire.codec import MAX_MESSAGE_BYTES, pack, unpack


def main(arguments: list[str]) -> int:
    """Exit status 0 when it is done; else one line on stderr."""
    try:
        if arguments[0] == "create":
            create_identity(Path(arguments[1]), KEY_NAME, CERTIFICATE_NAME)
            return 0
        question = unpack(sys.stdin.buffer.read(MAX_MESSAGE_BYTES))
        sys.stdout.buffer.write(pack(_answer(arguments, question)))
    except ImportError as failure:
        print(f"the package {failure.name} is missing", file=sys.stderr)
        return 1
    except (ConfidantError, OSError) as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def _answer(arguments: list[str], question: dict[str, Any]) -> dict[str, Any]:
    if arguments[0] == "sign":
        return {"signatures": sign_all(Path(arguments[1]), question["texts"])}
    return {"right": check_all(Claim(*claim) for claim in question["claims"])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
