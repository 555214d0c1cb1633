"""What a client of OpenAI's API asks for, checked field by field.

Fields that other clients send out of habit are taken where they ask for nothing that is not done
here, and refused by name where they do.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from confidantd.errors import UsageError
from confidantd.jobs.prompt import Messages, Prompt
from confidantd.jobs.serve import Asked
from confidantd.wire.sampling import MOST_LOGPROBS, Sampling

ROLES = ("system", "developer", "user", "assistant")
MOST_CHOICES, MOST_PROMPTS, MOST_STOPS = 16, 64, 16
DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's
# What is not done, and the values that ask for nothing.
NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
}
INSTEAD = {
    "frequency_penalty": "; `repetition_penalty` is",
    "presence_penalty": "; `repetition_penalty` is",
}


class BadRequestError(UsageError):
    """What is wrong with a request, and with which field; `api_code` is the API's word for it."""

    def __init__(self, message: str, param: str | None = None, api_code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.api_code = param, api_code


@dataclass(frozen=True, slots=True)
class Request:
    """A request for choices, each of which is `asked` for."""

    model: str
    asked: tuple[Asked, ...]  # so many `choices` for each prompt
    choices: int
    stream: bool
    usage_in_stream: bool


class Fields:
    """The fields of a JSON object by their types; null is as if a field were not there."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._body, self._where = body, where

    def get(self, name: str, kind: Callable[[Any], bool], what: str) -> Any:
        """A field's value, None if it is not there."""
        value = self._body.get(name)
        if value is not None and not kind(value):
            raise BadRequestError(f"`{self._where}{name}` must be {what}", self._where + name)
        return value

    def text(self, name: str) -> str | None:
        """A text."""
        found: str | None = self.get(name, lambda v: isinstance(v, str), "a text")
        return found

    def flag(self, name: str) -> bool:
        """True or false; false if it is not there."""
        return bool(self.get(name, lambda v: isinstance(v, bool), "true or false"))

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number within bounds."""

        def fits(value: Any) -> bool:
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            return plain and least <= value <= most

        found = self.get(name, fits, f"a number from {least:g} to {most:g}")
        return float(default if found is None else found)

    def whole(self, name: str, least: int, most: int = 1 << 53) -> int | None:
        """A whole number within bounds."""

        def fits(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        upper = f" to {most}" if most < 1 << 53 else " on"
        found: int | None = self.get(name, fits, f"a whole number from {least}{upper}")
        return found


def chat_request(body: Any) -> Request:
    """Of `/v1/chat/completions`."""
    fields = _fields(body)
    fields.whole("best_of", 1, 1)
    messages = Messages(tuple(_messages(body.get("messages"))))
    most = fields.whole("max_completion_tokens", 1) or fields.whole("max_tokens", 1)
    logprobs: int | None = None
    told = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        logprobs = told or 0
    elif told:
        raise BadRequestError("`top_logprobs` needs `logprobs`", "top_logprobs")
    return _request(body, fields, [messages], most, logprobs)


def completion_request(body: Any) -> Request:
    """Of `/v1/completions`."""
    fields = _fields(body)
    count = fields.whole("n", 1, MOST_CHOICES) or 1
    fields.whole("best_of", count, count)
    most = fields.whole("max_tokens", 1) or DEFAULT_COMPLETION_TOKENS
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    return _request(body, fields, _prompts(body.get("prompt")), most, logprobs)


def _fields(body: Any) -> Fields:
    if not isinstance(body, dict):
        raise BadRequestError("the request is not a JSON object")
    for name, nothing in NOT_DONE.items():
        if name in body and body[name] not in nothing:
            message = f"`{name}` is not supported by this server{INSTEAD.get(name, '')}"
            raise BadRequestError(message, name, "unsupported_parameter")
    return Fields(body)


def _request(
    body: Mapping[str, Any],
    fields: Fields,
    prompts: Sequence[Prompt],
    most: int | None,
    logprobs: int | None,
) -> Request:
    model = fields.text("model")
    if not model:
        raise BadRequestError("`model` is missing: name one of /v1/models", "model")
    seed = fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 2, 1),
        top_p=fields.number("top_p", 0, 1, 1) or math.ulp(0.0),  # 0: the likeliest one only
        top_k=max(0, fields.whole("top_k", -1, (1 << 31) - 1) or 0),
        min_p=fields.number("min_p", 0, 1, 0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100, 1),
        seed=secrets.randbits(62) if seed is None else seed,
        logprobs=logprobs,
    )
    count = fields.whole("n", 1, MOST_CHOICES) or 1
    options = fields.get("stream_options", lambda v: isinstance(v, dict), "an object") or {}
    asked = Asked(prompts[0], sampling, most, _stops(body.get("stop")), fields.text("user") or "")
    return Request(
        model,
        tuple(
            replace(asked, prompt=prompt, sampling=replace(sampling, seed=sampling.seed + index))
            for prompt in prompts
            for index in range(count)
        ),
        count,
        fields.flag("stream"),
        Fields(options, "stream_options.").flag("include_usage"),
    )


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    texts = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if not texts or len(stops) > MOST_STOPS:
        raise BadRequestError(f"`stop` must be a text, or up to {MOST_STOPS}", "stop")
    return tuple(stops)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadRequestError("`messages` must be a list of messages", "messages")
    return [_message(message, f"messages.{index}") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequestError(f"`{where}` must be an object", where)
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls"):
        raise BadRequestError(
            "tools are not supported by this server", where, "unsupported_parameter"
        )
    if role not in ROLES:
        raise BadRequestError(f"`{where}.role` must be one of {', '.join(ROLES)}", f"{where}.role")
    role = "system" if role == "developer" else role
    return {"role": role, "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    """A text, or parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequestError(f"`{where}` must be a text, or a list of parts", where)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise BadRequestError(f"`{where}` may have parts of type text only", where)
        texts.append(text)
    return "".join(texts)


def _prompts(value: Any) -> list[Prompt]:
    """A text, token ids, or several of these."""
    several: list[Any] = value if isinstance(value, list) else [value]
    if several and all(_is_token(item) for item in several):
        several = [several]
    right = 0 < len(several) <= MOST_PROMPTS and all(
        isinstance(p, str) or (isinstance(p, list) and p and all(map(_is_token, p)))
        for p in several
    )
    if not right:
        raise BadRequestError(
            f"`prompt` must be a text, a list of token ids, or up to {MOST_PROMPTS} of these",
            "prompt",
        )
    return several


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
