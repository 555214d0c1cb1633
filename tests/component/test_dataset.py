"""Text files to token blocks: equal to whole documents through `transformers`, clear refusals."""

from __future__ import annotations

import array
import json
import subprocess
import sys
from pathlib import Path

import pytest

from confidantd.errors import ConfidantError, DataError, ModelError, StorageError
from confidantd.jobs.dataset import prepare
from tests.component.tokenizer_files import (
    END,
    TEXT,
    byte_model,
    change_tokenizer,
    gpt2_model,
    reference,
)
from tests.reference import MODELS

LENGTH = 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return byte_model(tmp_path / "model")


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def prepared(model: Path, files: list[Path], out: Path, length: int = LENGTH) -> list[int]:
    """Tokens of the dataset made from `files`."""
    request = {"model": str(model), "files": [str(f) for f in files], "sequence_length": length}
    figures = prepare(request, out)
    assert figures == json.loads((out / "dataset.json").read_text())
    tokens = array.array("i", (out / "tokens.bin").read_bytes())
    assert len(tokens) == figures["tokens"] == figures["blocks"] * length
    return list(tokens)


def expected(model: Path, texts: list[str], end: int | None, length: int = LENGTH) -> list[int]:
    """Whole documents through `transformers`, joined and cut."""
    tokenizer = reference(model)
    ids: list[int] = []
    for text in texts:
        if ids and end is not None:
            ids.append(end)
        ids += tokenizer(text, add_special_tokens=False).input_ids
    return ids[: len(ids) // length * length]


def refused(model: Path, file: Path, out: Path, length: int = LENGTH) -> ConfidantError:
    """The error of a dataset that cannot be made; nothing may be left of it."""
    with pytest.raises(ConfidantError) as failure:
        prepared(model, [file], out, length)
    assert not list(out.glob("*")) if out.exists() else True
    assert "\n" not in failure.value.message
    return failure.value


def test_text_files_are_documents_joined_by_the_end_of_text_token(
    model: Path, tmp_path: Path
) -> None:
    texts = [TEXT, f"  leading space, {END} inside,\r\nand CRLF\n", "short"]
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(texts)]
    end = reference(model).eos_token_id
    assert prepared(model, files, tmp_path / "out") == expected(model, texts, end)


def test_records_are_documents(model: Path, tmp_path: Path) -> None:
    texts = ["first café", "second\u2028line", "third " * 10]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    file = write(tmp_path / "data.jsonl", "\ufeff" + "\r\n\n".join(lines) + "\n")
    end = reference(model).eos_token_id
    assert prepared(model, [file], tmp_path / "out") == expected(model, texts, end)


def test_truncation_and_padding_of_the_tokenizer_do_not_count(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.txt", TEXT)
    plain = prepared(model, [file], tmp_path / "plain")
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END,
    }  # fmt: skip
    change_tokenizer(model, truncation=truncation, padding=padding)
    assert prepared(model, [file], tmp_path / "out") == plain


def test_a_token_that_only_the_settings_call_special(model: Path, tmp_path: Path) -> None:
    change_tokenizer(model, added_tokens=[])
    text = f"one{END}two " * 10
    file = write(tmp_path / "data.txt", text)
    assert prepared(model, [file], tmp_path / "out") == expected(model, [text], None)


def test_gpt2_files_instead_of_tokenizer_json(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    model = gpt2_model(tmp_path / "model")
    text = f"{TEXT}<|endoftext|>after"
    file = write(tmp_path / "data.txt", text)
    theirs = GPT2Tokenizer(str(model / "vocab.json"), str(model / "merges.txt"))
    ids = theirs(text, add_special_tokens=False).input_ids
    found = prepared(model, [file], tmp_path / "out")
    assert found == ids[: len(ids) // LENGTH * LENGTH]


@pytest.mark.parametrize("name", ["stories260K", "slm4096-gpt2"])
def test_real_models(name: str, tmp_path: Path) -> None:
    model = MODELS / name
    if not model.is_dir():
        pytest.skip(f"{model} is not on this machine")
    text = (MODELS / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    file = write(tmp_path / "data.txt", text)
    assert prepared(model, [file], tmp_path / "out", 32) == expected(model, [text], None, 32)


def test_no_end_of_text_token_joins_documents_directly(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    del config["eos_token_id"]
    (model / "config.json").write_text(json.dumps(config))
    files = [write(tmp_path / f"{i}.txt", "some words here") for i in range(4)]
    texts = ["some words here"] * 4
    assert prepared(model, files, tmp_path / "out") == expected(model, texts, None)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("latin.txt", "abc é".encode("latin-1"), r"not UTF-8 text \(byte 4\)"),
        ("short.txt", b"abc", r"has \d tokens, fewer than one block of 8"),
        ("plain.jsonl", b'{"text": "a"}\nword\n', "line 2: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("list.jsonl", b"[1]\n", "line 1: there is no object"),
        (
            "gsm.jsonl",
            b'{"text": "a"}\n\n{"question": "q", "answer": "a"}\n',
            r"line 3: there is no field `text` with text \(fields: answer, question\)",
        ),
        ("number.jsonl", b'{"text": 5}\n', r"fields: text\)"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "half a character"),
    ],
)
def test_bad_data(model: Path, tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    failure = refused(model, file, tmp_path / "out")
    assert isinstance(failure, DataError)
    assert failure.message.startswith((str(file), "the text"))
    with pytest.raises(DataError, match=message):
        raise failure


def test_a_folder_is_no_data(model: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused(model, tmp_path, tmp_path / "out").message


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = byte_model(tmp_path / "model", vocabulary=100)
    file = write(tmp_path / "data.txt", TEXT)
    failure = refused(model, file, tmp_path / "out")
    assert "but the model knows 100 tokens" in failure.message
    assert "do not belong" in failure.hint


def test_no_tokenizer_that_can_be_read(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.txt", TEXT)
    (model / "tokenizer.json").write_text("{}")
    failure = refused(model, file, tmp_path / "out")
    assert isinstance(failure, ModelError)
    assert "cannot be read" in failure.message
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(model, file, tmp_path / "out").message
    (model / "tokenizer.model").write_bytes(b"\x0a")
    failure = refused(model, file, tmp_path / "out")
    assert "SentencePiece" in failure.message
    assert "save_pretrained" in failure.hint


def test_an_output_that_is_a_file(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.txt", TEXT)
    with pytest.raises(StorageError):
        prepared(model, [file], file)


def run_module(request: Path, out: Path) -> tuple[int, list[dict[str, object]]]:
    """Exit status and JSON lines of the subprocess."""
    found = subprocess.run(
        [sys.executable, "-m", "confidantd.jobs.dataset", str(request), str(out)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert found.stderr == ""
    return found.returncode, [json.loads(line) for line in found.stdout.splitlines()]


def test_the_subprocess_prints_json_lines(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "data.txt", TEXT)
    request = write(
        tmp_path / "request.json",
        json.dumps({"model": str(model), "files": [str(file)], "sequence_length": LENGTH}),
    )
    status, lines = run_module(request, tmp_path / "out")
    assert status == 0
    assert lines[0] == {"progress": "data.txt", "done": 0, "of": 1}
    assert lines[-1] == {"progress": "", "done": 1, "of": 1}
    assert (tmp_path / "out" / "tokens.bin").exists()
    file.unlink()
    status, lines = run_module(request, tmp_path / "out2")
    assert status == 1
    assert lines[-1]["error"]["code"] == "bad-data"
