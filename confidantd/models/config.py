"""Typed access to a `config.json` that anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confidantd.errors import ModelError, UnsupportedArchitectureError

MAX_JSON_BYTES = 64 * 1024 * 1024  # an index of a very large model is about 10 MB
MAX_SIZE = 1 << 31  # no dimension of a model is near it; keeps products within 64 bits


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `ModelError` if it is missing, too large or anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is over the limit of {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist", "give a model folder in Hugging Face form"
        ) from None
    except OSError as failure:
        raise ModelError(f"cannot read {path} ({failure.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not valid JSON", "download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


class Config:
    """The settings of one JSON object; each getter checks the type and names the setting."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = fields
        self.where = where

    def has(self, key: str) -> bool:
        """True if the setting is there and not null."""
        return self._fields.get(key) is not None

    def raw(self, key: str) -> Any:
        """The setting as it stands, None if absent."""
        return self._fields.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._fields.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_SIZE:
            return value
        raise ModelError(f"{self.where}: {key} must be a positive integer, not {value!r:.40}")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._fields.get(key)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30:
            return float(value)
        raise ModelError(f"{self.where}: {key} must be a positive number, not {value!r:.40}")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._fields.get(key)
        value = default if value is None else value
        if isinstance(value, bool):
            return value
        raise ModelError(f"{self.where}: {key} must be true or false, not {value!r:.40}")

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._fields.get(key)
        value = default if value is None else value
        if isinstance(value, str):
            return value
        raise ModelError(f"{self.where}: {key} must be a string, not {value!r:.40}")

    def part(self, key: str) -> Config:
        """A nested object; empty if absent."""
        value = self._fields.get(key)
        if value is None:
            return Config({}, f"{self.where}: {key}")
        if isinstance(value, Mapping):
            return Config(value, f"{self.where}: {key}")
        raise ModelError(f"{self.where}: {key} must be an object, not {value!r:.40}")

    def refuse(self, key: str, *accepted: object) -> None:
        """Refuse a setting that would not be computed exactly, unless absent or `accepted`."""
        value = self._fields.get(key)
        if value is not None and value not in accepted:
            raise UnsupportedArchitectureError(
                f"{self.where}: {key} = {value!r:.60} is not supported",
                "use a model without this setting",
            )


def end_tokens(*configs: Config) -> tuple[int, ...]:
    """`eos_token_id` (a number or a list) of the first config that has one."""
    for config in configs:
        value = config.raw("eos_token_id")
        if value is not None:
            tokens = value if isinstance(value, list) else [value]
            if all(isinstance(token, int) and token >= 0 for token in tokens):
                return tuple(tokens)
            raise ModelError(f"{config.where}: eos_token_id must be token ids, not {value!r:.40}")
    return ()
