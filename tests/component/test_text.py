"""Encoding prompts and decoding token streams: as `transformers` does on the whole sequence."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from confidantd.errors import ModelError, PromptTooLongError
from confidantd.jobs.prompt import TextProcess
from confidantd.jobs.text import UNFINISHED, StreamDecoder, TextServer
from confidantd.jobs.tokenizer import load_tokenizer
from tests.component.tokenizer_files import END, byte_model, gpt2_model, reference
from tests.reference import MODELS

PROMPT = "Once upon a time"
TEXTS = ("", " there was a café 🙂🙂 — 你好 and\n\n  spaces.", f"an {END} in the middle", " \n ")


def streamed(folder: Path, prompt: list[int], tokens: list[int]) -> list[str]:
    """The pieces of a stream, the flushed one last."""
    decoder = StreamDecoder(load_tokenizer(folder), prompt)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


def whole(folder: Path, prompt: list[int], tokens: list[int]) -> str:
    """What `transformers` decodes prompt and tokens to, less the prompt's part."""
    tokenizer = reference(folder)
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    return str(tokenizer.decode([*prompt, *tokens], skip_special_tokens=True))[len(start) :]


@pytest.fixture(params=["byte", "gpt2", "stories260K", "slm4096-gpt2", "gpt-nano-sort"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folders with tokenizers: two made here, and the real models where they are."""
    if request.param == "byte":
        return byte_model(tmp_path / "model")
    if request.param == "gpt2":
        made = gpt2_model(tmp_path / "model")
        load_tokenizer(made).save(str(made / "tokenizer.json"))  # for `transformers` to read
        return made
    found = MODELS / str(request.param)
    if not found.is_dir():
        pytest.skip(f"{found} is not on this machine")
    return found


def test_prompts_get_the_special_tokens(folder: Path) -> None:
    for text in (PROMPT, "ABCABC", *TEXTS):
        assert load_tokenizer(folder).encode(text).ids == reference(folder)(text).input_ids


def test_a_streamed_text_is_the_decoding_of_the_whole(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode(PROMPT).ids
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(streamed(folder, prompt, tokens)) == whole(folder, prompt, tokens)


def test_random_tokens_lose_no_character(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode(PROMPT).ids
    choose = random.Random(7)
    for _ in range(20):
        tokens = [choose.randrange(tokenizer.get_vocab_size()) for _ in range(24)]
        assert "".join(streamed(folder, prompt, tokens)) == whole(folder, prompt, tokens)


def test_long_texts_lose_nothing_where_little_is_decoded_again(folder: Path) -> None:
    """Far more tokens than a decoder keeps, some of them parts of characters."""
    tokenizer = load_tokenizer(folder)
    text = "".join(TEXTS) * 12
    prompt = tokenizer.encode(text).ids
    for tokens in (tokenizer.encode(text, add_special_tokens=False).ids, prompt[5:]):
        assert "".join(streamed(folder, prompt, tokens)) == whole(folder, prompt, tokens)


def test_single_tokens_look_as_they_stand_in_a_text(folder: Path) -> None:
    """Together they are the text, with its spaces."""
    tokenizer, text = load_tokenizer(folder), "ab there was a ball"
    if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) != text:
        pytest.skip("it does not know these letters")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    looks = TextServer(folder).answer({"look": ids})["texts"]
    assert "".join(looks).strip() == text


def test_only_complete_characters_are_given_out(tmp_path: Path) -> None:
    folder = byte_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode("a🦆b").ids  # four bytes that the tokenizer has never seen together
    pieces = streamed(folder, [], tokens)
    assert "".join(pieces) == "a🦆b"
    assert not any(UNFINISHED in piece for piece in pieces)
    cut = streamed(folder, [], tokens[:-2])
    assert cut[-1].startswith(UNFINISHED)


def answers(folder: Path, *questions: dict[str, Any]) -> list[dict[str, Any]]:
    """What the subprocess answers to questions, one line each."""
    found = subprocess.run(
        [sys.executable, "-m", "confidantd.jobs.text", str(folder)],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert found.stderr == ""
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_the_subprocess_answers_line_by_line(tmp_path: Path) -> None:
    folder = byte_model(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode(" the café").ids
    encoded, given, *pushed, rest, over, unknown, half, again = answers(
        folder,
        {"begin": 1, "most": None, "text": PROMPT},
        {"begin": 2, "most": None, "ids": tokens},
        *({"push": [[1, token], [2, token]]} for token in tokens),
        {"end": 1},
        {"end": 1},
        {"push": -1},
        {"begin": 3, "most": None, "text": "half \ud83d"},
        {"begin": 3, "most": None, "text": "still there"},
    )
    assert encoded == {"ids": tokenizer.encode(PROMPT).ids}
    assert given == {"ids": tokens}
    texts = ["".join(answer["texts"][i] for answer in pushed) for i in range(2)]
    assert [texts[0] + rest["text"], texts[1]] == [" the café", " the café"]
    assert over == {"text": ""}
    assert unknown["error"]["code"] == "protocol"
    assert half["error"]["code"] == "bad-data"
    assert again == {"ids": tokenizer.encode("still there").ids}


def test_the_subprocess_says_that_there_is_no_tokenizer(tmp_path: Path) -> None:
    first, second = answers(tmp_path, {"begin": 1, "most": None, "text": PROMPT}, {"end": 1})
    assert first["error"]["code"] == "bad-model"
    assert "has no tokenizer.json" in first["error"]["message"]
    assert second == first


async def test_a_prompt_that_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    """By its letters, or by its tokens; what comes after it is answered."""
    folder = await asyncio.to_thread(byte_model, tmp_path / "model")
    ids = (await asyncio.to_thread(load_tokenizer, folder)).encode(PROMPT).ids
    text = await TextProcess.start(folder, tmp_path / "text.log")
    try:
        tries = (("x" * 300_000, "letters"), ("x y z w", "tokens"), ([1] * 6, "tokens"))
        for prompt, of in tries:
            with pytest.raises(PromptTooLongError, match=f"{of}, and the context takes"):
                await text.begin(1, prompt, 5)
        assert await text.begin(1, PROMPT, 50) == ids
    finally:
        await text.close()


async def test_a_tokenizer_that_has_ended_answers_nobody_with_anothers_text(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(byte_model, tmp_path / "model")
    text = await TextProcess.start(folder, tmp_path / "text.log")
    try:
        asking = asyncio.ensure_future(text.begin(1, PROMPT))
        text._process.kill()
        with pytest.raises(ModelError):
            await asking
        for _ in range(2):
            with pytest.raises(ModelError, match="tokenizer of the model"):
                await text.begin(2, "something else")
    finally:
        await text.close()
