"""What the swarm keeps on disk: `HOME/term.json` and `HOME/addresses.json`. Blocking."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confidantd.identity.files import write_private_file
from confidantd.swarm.addresses import AddressBook
from confidantd.wire.messages import MAX_TERM

_log = logging.getLogger(__name__)

TERM_FILE = "term.json"
ADDRESSES_FILE = "addresses.json"
MAX_FILE_BYTES = 1024 * 1024


def load_term(home: Path) -> int:
    """The highest term this device has seen; 0 at first."""
    fields = _load(home / TERM_FILE)
    term = fields.get("term") if isinstance(fields, dict) else None
    return term if isinstance(term, int) and 0 <= term <= MAX_TERM else 0


def save_term(home: Path, term: int) -> None:
    """Written through to the disk before the term is used. `StorageError` if it cannot be."""
    write_private_file(home / TERM_FILE, json.dumps({"term": term}).encode())


def load_addresses(home: Path) -> AddressBook:
    """The remembered addresses of members."""
    return AddressBook.from_json(_load(home / ADDRESSES_FILE))


def save_addresses(home: Path, fields: Mapping[str, Any]) -> None:
    """Remember what `AddressBook.to_json` gave. `StorageError` if it cannot be written."""
    text = json.dumps(fields, indent=1)
    write_private_file(home / ADDRESSES_FILE, text.encode())


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return json.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as failure:
        _log.warning("%s cannot be read and starts anew: %s", path, failure)
        return None
