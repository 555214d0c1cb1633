"""A model's tokenizer, from the files in its folder. Imports `tokenizers`: not for the daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from confidantd.errors import ModelError

PREPARE_HINT = (
    "save the tokenizer in the fast form: "
    "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, with truncation and padding off; `ModelError` if there is none."""
    fast, vocabulary, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if fast.is_file():
            tokenizer = Tokenizer.from_file(str(fast))
        elif vocabulary.is_file() and merges.is_file():
            built = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
            tokenizer = Tokenizer.from_str(built.to_str())
        else:
            raise ModelError(f"{folder} has no tokenizer.json", PREPARE_HINT)
    except ModelError:
        raise
    except Exception as failure:  # `tokenizers` raises nothing narrower
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({str(failure)[:120]})", PREPARE_HINT
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Id of the token between documents: `eos_token` of the tokenizer, else of the model."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read(folder / name).get("eos_token")
        if isinstance(token, dict):  # an AddedToken as `transformers` writes it
            token = token.get("content")
        if isinstance(token, str):
            found = tokenizer.token_to_id(token)
            if found is not None:
                return int(found)
    end = _read(folder / "config.json").get("eos_token_id")
    if isinstance(end, list) and end:
        end = end[0]
    return end if isinstance(end, int) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
