"""A model folder in Hugging Face form: its spec, and where each tensor lies. Reads no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from confidantd.errors import CorruptFileError, MissingTensorError, ModelError
from confidantd.models.config import Config, end_tokens, read_json
from confidantd.models.families import family_of, spec_from_config
from confidantd.models.gguf_format import GgufFormat
from confidantd.models.imported import INDEX as IMPORTED
from confidantd.models.imported import imported_tensors, source_of
from confidantd.models.quantisation import own_formats
from confidantd.models.safetensors import FLOAT_DTYPES, TensorLocation, read_header
from confidantd.models.spec import ModelSpec
from confidantd.models.tensors import Source, head_sources, stage_sources

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_CONFIG_FILES = ("config.json", "generation_config.json")
_COMPARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a folder holds. `tensors` has exactly those the model needs, under the names that
    `transformers` writes for the full model, in the model's order. `source`: what the user named.
    `formats`: of matrices that are quantised there, as a `ModelSpec` names them.
    """

    path: Path
    source: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorLocation]
    tokenizer_files: tuple[Path, ...]
    config_files: tuple[Path, ...]
    formats: str = ""


def read_model(folder: Path) -> ModelFolder:
    """The model in `folder`; `ModelError` (or a subclass) with one clear line if it is unusable."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", "give a model folder in Hugging Face form")
    config = Config(read_json(folder / "config.json"), str(folder / "config.json"))
    spec = dataclasses.replace(
        spec_from_config(config),
        end_tokens=end_tokens(*_generation_config(folder), config),
    )
    stored = _canonical(spec, _stored_tensors(folder))
    sources = stage_sources(spec, 0, spec.layers, embedding=True, head=True)
    tensors = {source.name: _checked(folder, source, stored) for source in sources}
    _check_tied(folder, spec, stored)
    return ModelFolder(
        folder,
        source_of(folder),
        spec,
        tensors,
        _present(folder, _TOKENIZER_FILES),
        _present(folder, _CONFIG_FILES),
        own_formats(spec, {name: location.dtype for name, location in tensors.items()}),
    )


def _generation_config(folder: Path) -> tuple[Config, ...]:
    path = folder / "generation_config.json"
    return (Config(read_json(path), str(path)),) if path.exists() else ()


def _present(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


def _stored_tensors(folder: Path) -> dict[str, TensorLocation]:
    if (folder / IMPORTED).is_file():
        return imported_tensors(folder)
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    hint = "a folder with model.safetensors is needed"
    if any(folder.glob("pytorch_model*.bin")):
        hint = "convert its pytorch_model.bin to safetensors; pickled weights are not read"
    raise ModelError(f"{folder} has no {WEIGHTS}", hint)


def _sharded(folder: Path) -> dict[str, TensorLocation]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CorruptFileError(f"{folder / INDEX} has no valid weight_map", "download it again")
    headers = {}
    for file in sorted(set(weight_map.values())):
        if "/" in file or "\\" in file or file in ("", ".", ".."):  # an index may be hostile
            raise CorruptFileError(f"{folder / INDEX} names {file!r:.60}, which is not a file here")
        headers[file] = read_header(folder / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise MissingTensorError(
                f"{folder / file} lacks {name!r:.80}, which the index promises"
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _canonical(spec: ModelSpec, stored: Mapping[str, TensorLocation]) -> dict[str, TensorLocation]:
    family = family_of(spec.family)
    return {family.canonical_name(name): location for name, location in stored.items()}


def _checked(folder: Path, source: Source, stored: Mapping[str, TensorLocation]) -> TensorLocation:
    location = stored.get(source.name)
    if location is None:
        raise MissingTensorError(
            f"{folder} lacks the tensor {source.name}",
            "is this a causal language model?",
        )
    if location.shape != source.shape:
        raise ModelError(
            f"{location.file}: {source.name} has shape {list(location.shape)}, "
            f"config.json asks for {list(source.shape)}"
        )
    if location.dtype not in FLOAT_DTYPES and GgufFormat.parse(location.dtype) is None:
        raise ModelError(
            f"{location.file}: {source.name} has dtype {location.dtype}",
            f"supported: {', '.join(FLOAT_DTYPES)}",
        )
    return location


def _check_tied(folder: Path, spec: ModelSpec, stored: Mapping[str, TensorLocation]) -> None:
    """A tied model may store the LM head too, but only as a copy of the token table."""
    head = stored.get(family_of(spec.family).names["head.weight"])
    if not spec.tied or head is None:
        return
    table = stored[head_sources(spec)[-1].name]
    if (head.dtype, head.shape) != (table.dtype, table.shape) or not _same_bytes(head, table):
        raise ModelError(
            f"{folder}: config.json ties the LM head to the embedding, but the two differ",
            'set "tie_word_embeddings": false in config.json if both are meant',
        )


def _same_bytes(one: TensorLocation, other: TensorLocation) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.bytes, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, one.bytes - start)
            if first.read(size) != second.read(size):
                return False
    return True
