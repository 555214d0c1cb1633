"""Chats become texts as `transformers` makes them; a template can do no harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from confidantd.errors import ConfidantError, DataError, ModelError
from confidantd.jobs.chat_template import read_template
from confidantd.jobs.text import TextServer
from tests.component.tokenizer_files import byte_model, reference

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who <sat> on the mat? ä"},
    {"role": "assistant", "content": "The cat."},
    {"role": "user", "content": "Why?"},
]
PLAIN = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if message['role'] == 'nobody' %}{% continue %}{% endif %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{{ messages | tojson }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system messages here') }}{% endif %}{{ messages[0]['content'] }}"
)


def model(folder: Path, **settings: Any) -> Path:
    """A model folder with a byte tokenizer and these settings."""
    byte_model(folder)
    path = folder / "tokenizer_config.json"
    settings = {"bos_token": "<end>", **settings}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_a_chat_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", chat_template=PLAIN)
    template = read_template(folder, None)
    assert template is not None
    tokenizer: Any = reference(folder)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert template.render(CHAT) == text
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert TextServer(folder).answer({"begin": 1, "most": None, "messages": CHAT}) == {"ids": ids}


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    """A file given, a file of the model, its settings, one of several there; or none."""
    folder = model(tmp_path / "model")
    assert read_template(folder, None) is None
    with pytest.raises(ModelError, match="has no chat template"):
        TextServer(folder).answer({"begin": 1, "most": None, "messages": CHAT})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "settings"}]
    model(folder, chat_template=named)
    for name, text in (("", "settings"), ("chat_template.jinja", "of the model"), ("f", "given")):
        if name:
            (folder / name).write_text(text)
        found = read_template(folder, folder / "f" if name == "f" else None)
        assert found is not None
        assert found.render(CHAT) == text


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        (STRICT, DataError, "no system messages here"),
        ("{{ messages[0].content.unknown.more }}", DataError, "fails on the messages"),
        ("{% if %}", ModelError, "cannot be read"),
        ("{{ messages.__class__.__mro__ }}", DataError, "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", DataError, "fails"),
        ("{{ messages.append(1) }}", DataError, "unsafe"),
    ],
)
def test_what_a_template_does_wrong_is_said_in_a_line(
    tmp_path: Path, template: str, error: type[ConfidantError], words: str
) -> None:
    folder = model(tmp_path / "model", chat_template=template)
    with pytest.raises(error, match=words) as caught:
        TextServer(folder).answer({"begin": 1, "most": None, "messages": CHAT})
    assert "\n" not in caught.value.message
