"""`python -m confidantd.jobs.text FOLDER`: a tokenizer that answers JSON lines.

`{"encode": text}` -> `{"ids": [...]}` (with special tokens), `{"push": id}` ->
`{"text": what this token completes}`, `{"flush": true}` -> `{"text": the rest}`;
what fails is answered with `{"error": {...}}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from confidantd.confinement import confine
from confidantd.errors import ConfidantError, DataError, ProtocolError
from confidantd.jobs.documents import is_unicode
from confidantd.jobs.tokenizer import load_tokenizer

UNFINISHED = "\ufffd"  # what an incomplete character decodes to


class StreamDecoder:
    """Text of a token stream, given out as its characters become complete.

    The pieces together are the decoding of prompt and new tokens less that of the
    prompt, special tokens skipped: a tokenizer may join a token with those before it.
    Where bytes are tokens (SentencePiece), a run of them is one unit to the tokenizer, all
    of it valid or none, so its text waits for the run's end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = byte_tokens(tokenizer)
        self._ids = list(prompt)
        self._shown = len(self._decode())

    def push(self, token: int) -> str:
        """The text that one more token completes."""
        self._ids.append(token)
        if token in self._byte_tokens:
            return ""
        text = self._decode()
        if text.endswith(UNFINISHED):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is left at the end, complete or not."""
        return self._show(self._decode())

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
    """Answers the questions of one generation."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._decoder = StreamDecoder(self._tokenizer, [])

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question."""
        match question:
            case {"encode": str(text)}:
                if not is_unicode(text):
                    raise DataError("the prompt is not valid Unicode", "give it as UTF-8")
                ids = list(self._tokenizer.encode(text).ids)
                self._decoder = StreamDecoder(self._tokenizer, ids)
                return {"ids": ids}
            case {"push": int(token)} if token >= 0:
                return {"text": self._decoder.push(token)}
            case {"flush": True}:
                return {"text": self._decoder.flush()}
            case _:
                raise ProtocolError("the tokenizer was asked something unknown")


def main() -> int:
    """Serve until standard input ends."""
    failure: ConfidantError | None = None
    server: TextServer | None = None
    try:
        server = TextServer(Path(sys.argv[1]))
    except ConfidantError as caught:
        failure = caught
    for line in sys.stdin:
        try:
            if server is None:
                raise failure or ProtocolError("no tokenizer")
            answer = server.answer(json.loads(line))
        except ConfidantError as caught:
            answer = {"error": caught.to_wire()}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    confine()
    sys.exit(main())
