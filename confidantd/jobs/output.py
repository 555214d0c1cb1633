"""What training leaves behind: a `transformers` checkpoint or a `peft` adapter, written whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from confidantd.errors import OutputError
from confidantd.ids import Digest
from confidantd.models.adapter import adapter_config
from confidantd.models.safetensors import Piece, write_file
from confidantd.models.spec import LoraSpec, ModelSpec
from confidantd.store.blobs import BlobStore
from confidantd.wire.worker import TrainedTensor

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
    output: Path, model: Path, tensors: Mapping[str, TrainedTensor], store: BlobStore
) -> None:
    """A full checkpoint: float32 weights, the model's config, its tokenizer."""
    config = json.loads((model / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "float32"
    with _Folder(output) as folder:
        write_file(folder / "model.safetensors", _pieces(tensors, store))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in KEPT_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, folder / name)


def write_adapter(
    output: Path,
    model: Path,
    spec: ModelSpec,
    lora: LoraSpec,
    tensors: Mapping[str, TrainedTensor],
    store: BlobStore,
) -> None:
    """A LoRA adapter as `peft` saves it."""
    with _Folder(output) as folder:
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


class _Folder:
    """A new folder beside `output` that takes its place when everything is written."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def __enter__(self) -> Path:
        try:
            self._new = Path(
                tempfile.mkdtemp(prefix=f".{self._output.name}-", dir=self._output.parent)
            )
            self._new.chmod(0o755)
        except OSError as failure:
            raise self._failure(failure) from None
        return self._new

    def __exit__(self, _kind: object, failure: BaseException | None, _trace: object) -> None:
        try:
            if failure is None:
                if self._output.is_dir():
                    self._output.rmdir()  # it was empty when the job began; if not now, keep it
                self._new.rename(self._output)
                return
        except OSError as caught:
            failure = caught
        shutil.rmtree(self._new, ignore_errors=True)
        if isinstance(failure, OSError):
            raise self._failure(failure) from None

    def _failure(self, failure: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self._output} ({failure.strerror})",
            "free some disk space or choose another --output",
        )
