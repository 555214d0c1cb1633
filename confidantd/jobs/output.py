"""What training leaves behind: a `transformers` checkpoint or a `peft` adapter, written whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confidantd.errors import OutputError, StorageError
from confidantd.ids import Digest
from confidantd.models.adapter import adapter_config
from confidantd.models.safetensors import Piece, write_file
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.store.blobs import BlobStore
from confidantd.store.files import sync_folder, write_atomically
from confidantd.wire.worker import TrainedTensor

DONE_NAME = "done.json"
# What `from_pretrained` reads beside the weights; weights themselves are written anew.
KEPT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def write_checkpoint(
    folder: Path, model: Path, tensors: Mapping[str, TrainedTensor], store: BlobStore
) -> None:
    """A full checkpoint: float32 weights, the model's config, its tokenizer."""
    config = json.loads((model / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "float32"
    write_file(folder / "model.safetensors", _pieces(tensors, store))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in KEPT_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def write_adapter(
    folder: Path,
    model: Path,
    spec: ModelSpec,
    lora: LoraSpec,
    tensors: Mapping[str, TrainedTensor],
    store: BlobStore,
) -> None:
    """A LoRA adapter as `peft` saves it."""
    write_file(folder / "adapter_model.safetensors", _pieces(tensors, store))
    config = adapter_config(spec, lora, str(model))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _pieces(tensors: Mapping[str, TrainedTensor], store: BlobStore) -> list[Piece]:
    pieces = []
    for name, tensor in sorted(tensors.items()):
        assert tensor.digest is not None
        found = store.locate(Digest(tensor.digest))
        assert found is not None
        pieces.append(Piece(name, "F32", tensor.shape, found[0]))
    return pieces


class OutputFolder:
    """A new folder beside `output` that takes its place when everything is written.

    What the job then says is kept in its own folder `job` before that: a daemon that is killed
    meanwhile knows by it whether the job was done (`done_event`).
    """

    def __init__(self, output: Path, job: Path, done: Mapping[str, Any]) -> None:
        self._output, self._kept, self._done = output, job / DONE_NAME, done
        self._new = output.parent / f".{output.name}-{job.name}"

    def __enter__(self) -> Path:
        try:
            self._kept.unlink(missing_ok=True)
            shutil.rmtree(self._new, ignore_errors=True)  # of a run that was killed
            self._new.mkdir()
        except OSError as failure:
            raise self._failure(failure) from None
        return self._new

    def __exit__(self, _kind: object, failure: BaseException | None, _trace: object) -> None:
        if failure is None:
            try:
                self._take_place()
            except (OSError, StorageError) as caught:
                failure = caught
            else:
                with contextlib.suppress(OSError):  # a folder that may not be listed
                    sync_folder(self._output.parent)
                return
        self._kept.unlink(missing_ok=True)
        shutil.rmtree(self._new, ignore_errors=True)
        if isinstance(failure, OSError | StorageError):
            raise self._failure(failure) from None

    def _take_place(self) -> None:
        for path in self._new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(self._new)
        kept = {"folder": _identity(self._new), "done": self._done}
        write_atomically(self._kept, json.dumps(kept).encode())
        if self._output.is_dir():
            self._output.rmdir()  # it was empty when the job began; if not now, keep it
        self._new.rename(self._output)

    def _failure(self, failure: OSError | StorageError) -> OutputError:
        why = failure.message if isinstance(failure, StorageError) else failure.strerror
        return OutputError(
            f"cannot write {self._output} ({why})",
            "free some disk space or choose another --output",
        )


def done_event(job: Path, output: str | None) -> dict[str, Any] | None:
    """What a job said last whose output took its place, though nobody may have heard it."""
    if output is None:
        return None
    try:
        kept = json.loads((job / DONE_NAME).read_text())
        if kept["folder"] == _identity(Path(output)) and isinstance(kept["done"], dict):
            return kept["done"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _identity(folder: Path) -> list[int]:
    """The same for a folder that was renamed, another for any other."""
    status = folder.stat()
    return [status.st_dev, status.st_ino]
