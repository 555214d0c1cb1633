"""A model's chat template: how the messages of a chat become one text.

Jinja templates as `transformers` keeps them. A model's files are not trusted: they run in Jinja's
sandbox, without access to anything but the messages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from confidantd.errors import DataError, ModelError
from confidantd.jobs.tokenizer import special_tokens, tokenizer_settings

TEMPLATE_NAME, DEFAULT_NAME = "chat_template.jinja", "default"
MOST_LETTERS = 1 << 20


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _as_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: (
            datetime.now().astimezone().strftime(form)
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as failure:
            raise ModelError(f"the chat template cannot be read ({_line(failure)})") from None
        self._tokens = tokens

    def render(self, messages: Sequence[Any]) -> str:
        """The text up to where the answer begins."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._tokens
            )
        except _RefusedError as failure:
            raise DataError(f"the chat template refuses the messages ({failure})") from None
        except Exception as failure:  # noqa: BLE001 - a template may fail in any way
            raise DataError(f"the chat template fails on the messages ({_line(failure)})") from None


def read_template(folder: Path, file: Path | None) -> ChatTemplate | None:
    """The template in `file`, else the model's; None if it has none."""
    source = _read(file) if file is not None else _of_model(folder)
    return None if source is None else ChatTemplate(source, special_tokens(folder))


def _of_model(folder: Path) -> str | None:
    if (folder / TEMPLATE_NAME).is_file():
        return _read(folder / TEMPLATE_NAME)
    found = tokenizer_settings(folder).get("chat_template")
    if isinstance(found, list):  # several with names
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get(DEFAULT_NAME)
    return found if isinstance(found, str) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:MOST_LETTERS]
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or "it is not UTF-8"
        raise ModelError(f"the chat template {path} cannot be read ({reason})") from None


class _RefusedError(Exception):
    """What a template says about messages that it does not take."""


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message)[:200])


def _as_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:120] or type(failure).__name__
