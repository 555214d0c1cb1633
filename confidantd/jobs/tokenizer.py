"""A model's tokenizer, from the files in its folder. Imports `tokenizers`: not for the daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from confidantd.errors import ModelError

PREPARE_HINT = (
    "save the tokenizer in the fast form: "
    "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
GPT2_END = "<|endoftext|>"  # a special token of vocab.json + merges.txt though no file says so
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, with truncation and padding off; `ModelError` if there is none.

    As `transformers.PreTrainedTokenizerFast` does, tokens that the settings call special
    are special even where tokenizer.json does not say so.
    """
    fast, vocabulary, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    if not fast.is_file() and not (vocabulary.is_file() and merges.is_file()):
        raise _missing(folder)
    try:
        if fast.is_file():
            tokenizer = Tokenizer.from_file(str(fast))
        else:
            tokenizer = _gpt2(folder, vocabulary, merges)
    except Exception as failure:  # `tokenizers` raises nothing narrower
        reason = " ".join(str(failure).split())[:120]
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({reason})", PREPARE_HINT
        ) from failure
    _mark_special(tokenizer, folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Id of the token between documents: `eos_token` of the tokenizer, else of the model."""
    for name in SETTINGS:
        token = _content(_read(folder / name).get("eos_token"))
        found = None if token is None else tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    end = _read(folder / "config.json").get("eos_token_id")
    if isinstance(end, list) and end:
        end = end[0]
    return end if isinstance(end, int) else None


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing if it cannot be read."""
    return _read(folder / SETTINGS[0])


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by their names, as a chat template uses them."""
    found: dict[str, str] = {}
    for settings in (_read(folder / name) for name in SETTINGS):
        for name in SPECIAL_TOKENS:
            token = _content(settings.get(name))
            if token is not None:
                found.setdefault(name, token)
    return found


def _missing(folder: Path) -> ModelError:
    if (folder / "tokenizer.model").is_file():
        return ModelError(
            f"{folder} has a SentencePiece tokenizer.model only, and no tokenizer.json",
            PREPARE_HINT,
        )
    return ModelError(f"{folder} has no tokenizer.json", PREPARE_HINT)


def _gpt2(folder: Path, vocabulary: Path, merges: Path) -> Tokenizer:
    prefix = _read(folder / SETTINGS[0]).get("add_prefix_space") is True
    built = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges), add_prefix_space=prefix)
    tokenizer = Tokenizer.from_str(built.to_str())
    if tokenizer.token_to_id(GPT2_END) is not None:
        tokenizer.add_special_tokens([GPT2_END])
    return tokenizer


def _mark_special(tokenizer: Tokenizer, folder: Path) -> None:
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = dict.fromkeys(token for name in SETTINGS for token in _named(_read(folder / name)))
    tokenizer.add_special_tokens(
        [t for t in named if t not in known and tokenizer.token_to_id(t) is not None]
    )


def _named(settings: dict[str, Any]) -> Iterator[str]:
    """The special tokens that a settings file names."""
    more = settings.get("additional_special_tokens")
    values = [settings.get(name) for name in SPECIAL_TOKENS]
    for value in [*values, *(more if isinstance(more, list) else ())]:
        token = _content(value)
        if token:
            yield token


def _content(value: Any) -> str | None:
    if isinstance(value, dict):  # an AddedToken as `transformers` writes it
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
