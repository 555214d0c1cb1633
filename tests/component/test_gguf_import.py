"""The folders of GGUF files: made once, made again where they are damaged, never half."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from confidantd.errors import ModelError, StorageError
from confidantd.jobs import importing
from confidantd.jobs.importing import Importer
from confidantd.jobs.options import GenerateOptions, model_folder
from confidantd.models.folder import read_model
from confidantd.models.imported import INDEX
from tests.unit.gguf_bytes import SETTINGS, content, tensors_of

TOKENS = [f"t{number}" for number in range(38)]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", *TOKENS, "ab"], "tokenizer.ggml.merges": ["a b"],
}  # fmt: skip


def write(path: Path) -> Path:
    """A whole model."""
    path.write_bytes(content({**SETTINGS, **VOCABULARY}, tensors_of()))
    return path


def found(importer: Importer, model: Path) -> Path:
    """The folder that a job is given."""
    options = asyncio.run(importer.with_folder(GenerateOptions(str(model), "x")))
    return Path(options.model)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    importer = Importer(tmp_path / "home")
    for model in (tmp_path, tmp_path / "missing.gguf"):
        assert found(importer, model) == model
    (tmp_path / "folder.gguf").mkdir()
    assert found(importer, tmp_path / "folder.gguf") == tmp_path / "folder.gguf"
    with pytest.raises(ModelError, match="no model folder"):
        model_folder(str(tmp_path / "missing.gguf"))


def test_it_is_made_once_and_again_for_another_file(tmp_path: Path) -> None:
    file, importer = write(tmp_path / "a.gguf"), Importer(tmp_path / "home")
    folder = found(importer, file)
    written = (folder / INDEX).stat().st_mtime_ns
    assert found(Importer(tmp_path / "home"), file) == folder
    assert (folder / INDEX).stat().st_mtime_ns == written
    assert read_model(folder).source == file
    link = tmp_path / "link.GGUF"
    link.symlink_to(file)
    assert read_model(found(importer, link)).source == link
    file.write_bytes(file.read_bytes() + bytes(32))
    assert found(importer, file) != folder


def test_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    file, importer = write(tmp_path / "a.gguf"), Importer(tmp_path / "home")
    folder = found(importer, file)
    index = json.loads((folder / INDEX).read_text())
    del index["tensors"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert found(importer, file) == folder
    assert "model.norm.weight" in read_model(folder).tensors


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what is cancelled."""
    file, home = write(tmp_path / "a.gguf"), tmp_path / "home"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged"):
        found(Importer(home), file)
    assert not list((home / "imported").iterdir())
    write(file)

    async def cancelled() -> None:
        begun = asyncio.Event()

        async def endless(*_: object) -> None:
            begun.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(importing, "run_module", endless)
        job = asyncio.create_task(Importer(home).with_folder(GenerateOptions(str(file), "x")))
        await begun.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(cancelled())
    assert not list((home / "imported").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        found(Importer(tmp_path / "file"), file)


def test_old_folders_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "MAX_REMEMBERED", 2)
    importer = Importer(tmp_path / "home")
    folders = [found(importer, write(tmp_path / f"{name}.gguf")) for name in "abc"]
    assert not folders[0].exists()
    assert folders[1].exists()
    assert folders[2].exists()
