"""`python -m confidantd.identity FOLDER`: make the key and the certificate in FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from confidantd.errors import ConfidantError
from confidantd.identity.certificate import CERTIFICATE_NAME, KEY_NAME
from confidantd.identity.create import create_identity


def main() -> int:
    """Exit status 0 when both files are there; else one line on stderr."""
    try:
        create_identity(Path(sys.argv[1]), KEY_NAME, CERTIFICATE_NAME)
    except ImportError as failure:
        print(f"the package {failure.name} is missing", file=sys.stderr)
        return 1
    except ConfidantError as failure:
        print(failure.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
