"""Answers in the shapes of OpenAI's API: whole ones, and chunks of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from confidantd.jobs.serve import Piece


@dataclass(slots=True)
class Told:
    """A piece, with the texts of its token and of the likeliest ones where they are told, and how
    many letters of tokens were before it.
    """

    piece: Piece
    offset: int = 0
    token: str = ""
    likeliest: tuple[str, ...] = ()


@dataclass(slots=True)
class Choice:
    """One answer as far as it is known."""

    prompt_tokens: int
    logprobs: bool
    told: list[Told] = field(default_factory=list)
    letters: int = 0

    @property
    def text(self) -> str:
        """So far."""
        return "".join(told.piece.text for told in self.told)

    @property
    def finished(self) -> str | None:
        """Why it has ended."""
        return (self.told[-1].piece.finished or None) if self.told else None


class Shape:
    """Of the answers to one request; `prompts` have several choices each."""

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """An answer that is not streamed."""
        found = [
            {**self._content(choice), "index": index, "finish_reason": choice.finished,
             "logprobs": self._logprobs(choice.told) if choice.logprobs else None}
            for index, choice in enumerate(choices)
        ]  # fmt: skip
        usage = usage_of(choices, prompt_tokens)
        return {**self._head, "object": self.kind, "choices": found, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, if there is one before any text."""
        del index
        return None

    def piece(self, index: int, choice: Choice) -> dict[str, Any]:
        """The chunk of the last piece of a choice."""
        told = choice.told[-1:]
        found = {**self._delta(told[0].piece.text), "index": index, "finish_reason": None,
                 "logprobs": self._logprobs(told) if choice.logprobs else None}  # fmt: skip
        return self._chunk([found])

    def end(self, index: int, choice: Choice) -> dict[str, Any]:
        """The last chunk of a choice, which says why it has ended."""
        found = {**self._delta(None), "index": index, "finish_reason": choice.finished,
                 "logprobs": None}  # fmt: skip
        return self._chunk([found])

    def usage(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream, where it is asked for."""
        return {**self._chunk([]), "usage": usage_of(choices, prompt_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk, "choices": choices}

    def _content(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any]:
        return {
            "tokens": [one.token for one in told],
            "token_logprobs": [one.piece.token.logprob for one in told],
            "top_logprobs": [
                {t: lp for t, (_, lp) in zip(o.likeliest, o.piece.token.likeliest, strict=True)}
                for o in told
            ],
            "text_offset": [one.offset for one in told],
        }


class ChatShape(Shape):
    """Of chat completions."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "finish_reason": None}])

    def _content(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **_token(one.token, one.piece.token.logprob),
                    "top_logprobs": [
                        _token(text, logprob)
                        for text, (_, logprob) in zip(
                            one.likeliest, one.piece.token.likeliest, strict=True
                        )
                    ],
                }
                for one in told
            ],
            "refusal": None,
        }


def usage_of(choices: Sequence[Choice], prompt_tokens: int) -> dict[str, int]:
    """Tokens of a request."""
    new = sum(len(choice.told) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
