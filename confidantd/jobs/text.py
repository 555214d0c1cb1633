"""`python -m confidantd.jobs.text FOLDER [TEMPLATE]`: a tokenizer that answers JSON lines.

A prompt begins a text, which has a number: `{"begin": number, "most": n, "text": prompt}` (with
special tokens; `n` null: any length), or instead of the text `"ids": [...]`, or `"messages": [...]`
(by the model's chat template, or that in the file TEMPLATE) -> `{"ids": [...]}`.
`{"push": [[number, id], ...]}` -> `{"texts": what each token completes}`.
`{"look": [id, ...]}` -> `{"texts": what each token is by itself}`.
`{"end": number}` -> `{"text": the rest}`.
What fails is answered with `{"error": {...}}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from confidantd.confinement import confine
from confidantd.errors import (
    ConfidantError,
    DataError,
    ModelError,
    PromptTooLongError,
    ProtocolError,
)
from confidantd.jobs.chat_template import read_template
from confidantd.jobs.documents import is_unicode
from confidantd.jobs.tokenizer import load_tokenizer

UNFINISHED = "\ufffd"  # what an incomplete character decodes to
LEAST_LONGEST = 8  # letters a token
MOST_WINDOW, LEAST_WINDOW = 96, 32  # tokens that are decoded again for each one


class StreamDecoder:
    """Text of a token stream, given out as its characters become complete.

    The pieces together are the decoding of prompt and new tokens less that of the
    prompt, special tokens skipped: a tokenizer may join a token with those before it, so some of
    them are decoded with it.
    Where bytes are tokens (SentencePiece), a run of them is one unit to the tokenizer, all
    of it valid or none, so its text waits for the run's end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = byte_tokens(tokenizer)
        self._ids = list(prompt)
        self._shown = 0
        self._forget()

    def push(self, token: int) -> str:
        """The text that one more token completes."""
        self._ids.append(token)
        if token in self._byte_tokens:
            return ""
        text = self._decode()
        if text.endswith(UNFINISHED):
            return ""
        found = self._show(text)
        if len(self._ids) > MOST_WINDOW:
            self._forget()
        return found

    def flush(self) -> str:
        """What is left at the end, complete or not."""
        return self._show(self._decode())

    def _forget(self) -> None:
        """All but the last tokens, from the beginning of a character on."""
        start = max(0, len(self._ids) - LEAST_WINDOW)
        while start > 0 and self._splits(start):
            start -= 1
        self._ids = self._ids[start:]
        self._shown = len(self._decode())

    def _splits(self, start: int) -> bool:
        """Whether a window from there on would begin within a character, or a run of bytes."""
        if self._ids[start - 1] in self._byte_tokens:
            return True
        before = self._tokenizer.decode(self._ids[max(0, start - 8) : start])
        return str(before).endswith(UNFINISHED)

    def _show(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))


def byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens `<0x00>` to `<0xFF>`, where the tokenizer decodes them to bytes."""
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    letter = ids[ord("A")]
    if letter is None or tokenizer.decode([letter]) != "A":
        return frozenset()
    return frozenset(token for token in ids if token is not None)


class TextServer:
    """Answers the questions of one job."""

    def __init__(self, folder: Path, template: Path | None = None) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._template = read_template(folder, template)
        self._decoders: dict[int, StreamDecoder] = {}
        self._longest = max(LEAST_LONGEST, *map(len, self._tokenizer.get_vocab()))  # in letters

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question."""
        match question:
            case {"begin": int(number), "most": int() | None as most, **given}:
                ids = self._ids(given, most)
                self._decoders[number] = StreamDecoder(self._tokenizer, ids)
                return {"ids": ids}
            case {"push": list(pairs)}:
                return {"texts": [self._push(number, token) for number, token in pairs]}
            case {"look": list(ids)}:
                return {"texts": [self._look(token) for token in ids]}
            case {"end": int(number)}:
                decoder = self._decoders.pop(number, None)
                return {"text": "" if decoder is None else decoder.flush()}
            case _:
                raise ProtocolError("the tokenizer was asked something unknown")

    def _ids(self, given: dict[str, Any], most: int | None) -> list[int]:
        match given:
            case {"text": str(text)}:
                return self._encoded(text, most, special=True)
            case {"ids": list(ids)}:
                _check_length(len(ids), most, "tokens")
                return [int(token) for token in ids]
            case {"messages": list(messages)}:
                if self._template is None:
                    raise ModelError(
                        "the model has no chat template",
                        "give --chat-template FILE to `serve` or `chat`, or use completions",
                    )
                return self._encoded(self._template.render(messages), most, special=False)
            case _:
                raise ProtocolError("the tokenizer was asked something unknown")

    def _encoded(self, text: str, most: int | None, *, special: bool) -> list[int]:
        """Of a text that cannot fit nobody has to wait for the tokens."""
        if not is_unicode(text):
            raise DataError("the prompt is not valid Unicode", "give it as UTF-8")
        if most is not None:
            _check_length(len(text), most * self._longest, "letters")
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        _check_length(len(ids), most, "tokens")
        return ids

    def _look(self, token: int) -> str:
        """A token as it stands in a text: behind another one, or it may lose its space."""
        decode, ids = (
            self._tokenizer.decode,
            self._tokenizer.encode("a", add_special_tokens=False).ids,
        )
        before = decode(ids, skip_special_tokens=False)
        both = decode([*ids, token], skip_special_tokens=False)
        return str(both[len(before) :] if both.startswith(before) else decode([token]))

    def _push(self, number: int, token: int) -> str:
        decoder = self._decoders.get(number)
        return "" if decoder is None or token < 0 else decoder.push(token)


def _check_length(length: int, most: int | None, of: str) -> None:
    if most is not None and length > most:
        raise PromptTooLongError(
            f"the prompt has {length} {of}, and the context takes {most}",
            "give a shorter one, or serve the model with a larger --context",
        )


def main() -> int:
    """Serve until standard input ends."""
    failure: ConfidantError | None = None
    server: TextServer | None = None
    try:
        server = TextServer(*map(Path, sys.argv[1:3]))
    except ConfidantError as caught:
        failure = caught
    for line in sys.stdin:
        try:
            if server is None:
                raise failure or ProtocolError("no tokenizer")
            answer = server.answer(json.loads(line))
        except ConfidantError as caught:
            answer = {"error": caught.to_wire()}
        except Exception as caught:  # noqa: BLE001 - `tokenizers` raises nothing narrower
            told = " ".join(str(caught).split())[:120]
            answer = {"error": DataError(f"the text cannot be tokenised ({told})").to_wire()}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    confine()
    sys.exit(main())
