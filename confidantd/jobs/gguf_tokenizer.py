"""The tokenizer of a GGUF file as the files that `tokenizers` and `transformers` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confidantd.errors import CorruptFileError, ModelError
from confidantd.models.gguf import GgufHeader

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens that are found before all others
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONVERT_HINT = "use the model's folder in Hugging Face form"


def _bytes(*, regex: bool) -> dict[str, Any]:
    """Letters that stand for bytes, after a cut into words as GPT-2 has it, or as it is."""
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex,
    }  # fmt: skip


def _cut(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _bytes(regex=False)]}


_LLAMA3 = _cut(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}")
_SINGLE_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes(regex=True)],
}


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a text is cut into words. `whole`: a word that is a token is not cut further."""

    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    whole: bool = False
    begins: bool = False  # with the token for it, unless the file says otherwise


_CUTS: Mapping[str, _Cut] = {  # by the names that llama.cpp gives them
    "gpt-2": _Cut(_bytes(regex=True)),
    "llama-bpe": _Cut(_LLAMA3, whole=True, begins=True),
    "llama3": _Cut(_LLAMA3, whole=True, begins=True),
    "llama-v3": _Cut(_LLAMA3, whole=True, begins=True),
    "qwen2": _Cut(_cut(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), {"type": "NFC"}),
    "smollm": _Cut(_SINGLE_DIGITS),
}


def tokenizer_of(header: GgufHeader) -> dict[str, Any]:
    """`tokenizer.json` and `tokenizer_config.json` by their names."""
    vocabulary = _Vocabulary(header)
    match vocabulary.text("model"):
        case "llama":
            tokenizer = _sentence_piece(vocabulary)
        case "gpt2":
            tokenizer = _byte_pairs(vocabulary)
        case other:
            raise ModelError(
                f"{header.path}: its tokenizer is of the kind {other!r:.40}, which is not read",
                f"supported: llama, gpt2; {_CONVERT_HINT}",
            )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "unk"):
        token = vocabulary.special(name)
        if token is not None:
            settings[f"{name}_token"] = vocabulary.tokens[token]
    template = vocabulary.field("chat_template", prefix="tokenizer")
    if isinstance(template, str):
        settings["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


class _Vocabulary:
    """The fields `tokenizer.ggml.*` of a file, each of its type."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.tokens: list[str] = self._list("tokens", str)
        kinds: list[int] = self._list("token_type", int, len(self.tokens)) or [1] * len(self.tokens)
        marked = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
        self.added = [
            {
                "id": token, "content": text, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": marked[kind],
            }
            for token, (text, kind) in enumerate(zip(self.tokens, kinds, strict=True))
            if kind in marked and text
        ]  # fmt: skip

    def field(self, name: str, prefix: str = "tokenizer.ggml") -> Any:
        """As it stands; None if it is not there."""
        return self._header.fields.get(f"{prefix}.{name}")

    def text(self, name: str) -> str:
        """A string, which may be missing."""
        found = self.field(name)
        return found if isinstance(found, str) else ""

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        found = self.field(name)
        return found if isinstance(found, bool) else default

    def special(self, name: str) -> int | None:
        """The id of a special token; None if there is none."""
        long = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}[name]
        found = self.field(long)
        return found if type(found) is int and 0 <= found < len(self.tokens) else None

    def scores(self) -> list[float]:
        """Of each token."""
        return self._list("scores", float, len(self.tokens))

    def merges(self) -> list[list[str]]:
        """Pairs of tokens that become one, the first ones first."""
        found = [merge.split(" ") for merge in self._list("merges", str)]
        if any(len(pair) != 2 for pair in found):
            raise self._corrupt("merges")
        return found

    def cut(self) -> _Cut:
        """How words are cut."""
        name = self.text("pre")
        if name not in _CUTS:
            told = f"{name!r:.40} is not known" if name else "it does not say"
            raise ModelError(
                f"{self._header.path}: how does its tokenizer cut words? {told}",
                f"supported: {', '.join(_CUTS)}; {_CONVERT_HINT}",
            )
        return _CUTS[name]

    def _list(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        found = self.field(name)
        if found is None and length is not None:
            return []
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise self._corrupt(name)
        if length is not None and len(found) != length:
            raise self._corrupt(name)
        return found

    def _corrupt(self, name: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self._header.path}: tokenizer.ggml.{name} is missing or not valid",
            "download or convert the model again",
        )


def _file(
    vocabulary: _Vocabulary, model: Mapping[str, Any], parts: Mapping[str, Any], *, begins: bool
) -> dict[str, Any]:
    """`tokenizer.json` around a model."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _beginning(vocabulary, begins=begins),
        **parts,
        "model": {
            "type": "BPE", "dropout": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "vocab": {text: token for token, text in enumerate(vocabulary.tokens)}, **model,
        },
    }  # fmt: skip


def _beginning(vocabulary: _Vocabulary, *, begins: bool) -> dict[str, Any] | None:
    """Puts a token before each text, where the file says so or `begins` by default."""
    first = vocabulary.special("bos")
    if first is None or not vocabulary.flag("add_bos_token", begins):
        return None
    text = vocabulary.tokens[first]
    start = {"SpecialToken": {"id": text, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [start, one],
        "pair": [start, one, start, two],
        "special_tokens": {text: {"id": text, "ids": [first], "tokens": [text]}},
    }


def _byte_pairs(vocabulary: _Vocabulary) -> dict[str, Any]:
    """GPT-2's kind: letters that stand for bytes, and merges of them."""
    cut = vocabulary.cut()
    model = {
        "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": cut.whole,
        "merges": vocabulary.merges(),
    }  # fmt: skip
    parts = {
        "normalizer": cut.normalizer,
        "pre_tokenizer": cut.pre_tokenizer,
        "decoder": _bytes(regex=True),
    }
    return _file(vocabulary, model, parts, begins=cut.begins)


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Llama 2's kind: of all pairs of neighbours that are a token together, the one whose token
    has the best score becomes it, until there is none; letters that are no token become bytes.
    """
    prefixed = vocabulary.flag("add_space_prefix", default=True)
    unknown = vocabulary.special("unk")
    model = {
        "unk_token": vocabulary.tokens[unknown] if unknown is not None else None,
        "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "merges": _merges_by_score(vocabulary),
    }  # fmt: skip
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
    }
    return _file(vocabulary, model, parts, begins=True)


def _merges_by_score(vocabulary: _Vocabulary) -> list[list[str]]:
    """Every way to make a token of two, the tokens with the best score first."""
    tokens, scores = vocabulary.tokens, vocabulary.scores()
    if not scores:
        raise ModelError("the tokens have no scores", _CONVERT_HINT)
    skipped = {entry["content"] for entry in vocabulary.added}
    known = {text for text in tokens if text not in skipped}
    order = sorted(range(len(tokens)), key=lambda token: -scores[token])
    return [
        [text[:at], text[at:]]
        for text in (tokens[token] for token in order)
        if text in known
        for at in range(1, len(text))
        if text[:at] in known and text[at:] in known
    ]
