"""Tokenizers of GGUF files encode and decode as those that the models came with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from confidantd.errors import ConfidantError, CorruptFileError, ModelError
from confidantd.jobs.chat_template import read_template
from confidantd.jobs.gguf_import import import_file, main
from confidantd.jobs.gguf_tokenizer import tokenizer_of
from confidantd.jobs.tokenizer import end_of_text, load_tokenizer
from confidantd.models.gguf import GgufHeader
from tests.component.test_engine_decoding import real_model
from tests.gguf_files import describe_tokenizer, write_gguf

TEXTS = (
    "The devices on the shelf", "  two  spaces ", "I'll say: IT'S 12345 o'clock, isn't it?", "",
    " ", "\n\n\tdef f(x):\r\n    return x ** 2\n", "naïve café — 你好\uff0c世界 😀👍🏽 e\u0301",
    "<|end|>", "a<|start|>b <|end|> c", "日本語 ١٢٣ ²³ 1,000.00", "_snake_case__ CamelCase",
)  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(pre: str) -> Tokenizer:
    """A tokenizer that is trained on this file, cutting words as the named models do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cuts: dict[str, Any] = {
        "gpt-2": words,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), letters]
        ),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), letters]),
    }
    tokenizer.pre_tokenizer = cuts[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|start|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([Path(__file__).read_text(), *TEXTS], trainer)
    return tokenizer


def imported(
    folder: Path, tokenizer: dict[str, Any], pre: str, more: Any = None, **fields: Any
) -> Path:
    """The folder of a small model with this tokenizer."""
    vocabulary = len(tokenizer["model"]["vocab"]) + 2
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    describe = describe_tokenizer(tokenizer, pre=pre, **fields)

    def both(writer: Any) -> None:
        describe(writer)
        if more is not None:
            more(writer)

    write_gguf(folder / "m.gguf", LlamaForCausalLM(config), lambda _: "Q8_0", both)
    (folder / "m").mkdir()
    import_file(folder / "m.gguf", folder / "m")
    return folder / "m"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_pairs(tmp_path: Path, pre: str) -> None:
    """Ids and texts; what the file does not say of the first token is as `llama.cpp` has it."""
    wanted = byte_level(pre)
    folder = imported(tmp_path, json.loads(wanted.to_str()), pre, bos_token_id=0, eos_token_id=1)
    found = load_tokenizer(folder)
    begins = [0] if pre == "llama-bpe" else []
    for text in TEXTS:
        ids = wanted.encode(text).ids
        assert found.encode(text).ids == begins + ids, text
        assert found.encode(text, add_special_tokens=False).ids == ids
        for skip in (False, True):
            decoded = [t.decode(ids, skip_special_tokens=skip) for t in (found, wanted)]
            assert decoded[0] == decoded[1], text
    assert end_of_text(folder, found) == 1
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    assert fast("The devices")["input_ids"] == found.encode("The devices").ids
    assert (fast.bos_token, fast.eos_token) == ("<|start|>", "<|end|>")


def test_the_first_token_is_as_the_file_says(tmp_path: Path) -> None:
    tokenizer = json.loads(byte_level("gpt-2").to_str())
    for adds in (True, False):
        folder = tmp_path / str(adds)
        folder.mkdir()
        found = load_tokenizer(
            imported(folder, tokenizer, "gpt-2", bos_token_id=0, add_bos_token=adds)
        )
        assert (found.encode("x").ids[0] == 0) == adds


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_piece(tmp_path: Path, prefixed: bool) -> None:
    """A real Llama's: the merges are found again from the scores of tokens."""
    source = json.loads((real_model("stories260K").path / "tokenizer.json").read_text())
    folder = imported(
        tmp_path, source, "", bos_token_id=1, eos_token_id=2, unknown_token_id=0,
        add_space_prefix=prefixed,
    )  # fmt: skip
    if not prefixed:
        source["normalizer"] = source["normalizer"]["normalizers"][1]
        parts = source["decoder"]["decoders"]
        source["decoder"]["decoders"] = [part for part in parts if part["type"] != "Strip"]
    wanted, found = Tokenizer.from_str(json.dumps(source)), load_tokenizer(folder)
    book = Path(__file__).read_text()
    for text in (*TEXTS, book, "a<s>b</s> c", "▁x"):
        ids = wanted.encode(text).ids
        assert found.encode(text).ids == ids, text
        assert found.decode(ids) == wanted.decode(ids)


def test_the_chat_template_comes_along(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    folder = imported(
        tmp_path, json.loads(byte_level("gpt-2").to_str()), "gpt-2",
        lambda writer: writer.add_chat_template(template), bos_token_id=0,
    )  # fmt: skip
    found = read_template(folder, None)
    assert found is not None
    assert found.render([{"role": "user", "content": "hi"}]) == "<|start|>[hi]"


GPT2 = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": "bert"}, "bert"),
        ({"model": None}, "kind ''"),
        ({"pre": "other"}, "'other' is not known"),
        ({"pre": None}, "does not say"),
        ({"tokens": None}, "tokens"),
        ({"tokens": ["a", 1]}, "tokens"),
        ({"token_type": [1]}, "token_type"),
        ({"merges": ["ab"]}, "merges"),
        ({"merges": None}, "merges"),
        ({"model": "llama"}, "scores"),
        ({"model": "llama", "scores": [1.0]}, "scores"),
    ],
)
def test_what_cannot_be_read_is_a_clear_line(
    tmp_path: Path, fields: dict[str, Any], word: str
) -> None:
    given = {**GPT2, **fields}
    header = GgufHeader(
        tmp_path, {f"tokenizer.ggml.{n}": v for n, v in given.items() if v is not None}, {}
    )
    with pytest.raises((ModelError, CorruptFileError), match=word):
        tokenizer_of(header)


def test_an_import_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tokenizer that `tokenizers` does not take, too."""
    tokenizer = json.loads(byte_level("gpt-2").to_str())
    tokenizer["model"]["merges"].append(["nobody", "knows"])
    with pytest.raises(ConfidantError, match="cannot be read"):
        imported(tmp_path, tokenizer, "gpt-2")
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    assert main(tmp_path / "x.gguf", tmp_path) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "not a GGUF file" in json.loads(line)["error"]["message"]
