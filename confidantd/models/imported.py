"""The index of a model folder whose tensors lie in another file: made once of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from confidantd.errors import CorruptFileError, ModelError
from confidantd.models.config import read_json
from confidantd.models.safetensors import TensorLocation

INDEX = "gguf.json"
SUFFIX = ".gguf"


def is_file_model(model: str) -> bool:
    """Whether a model is one file rather than a folder."""
    return model.lower().endswith(SUFFIX) and Path(model).is_file()


def identity(file: Path) -> dict[str, Any]:
    """What changes when a file is written or replaced; `ModelError` if there is none."""
    try:
        status = file.stat()
    except OSError as failure:
        raise ModelError(f"there is no model file {file} ({failure.strerror})") from None
    return {
        "file": str(file),
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "size": status.st_size,
    }


def source_of(folder: Path) -> Path:
    """The file that a folder was made of, or the folder if it is a model itself."""
    return Path(_index(folder)["source"]["file"]) if (folder / INDEX).is_file() else folder


def imported_tensors(folder: Path) -> dict[str, TensorLocation]:
    """The tensors by their names; `CorruptFileError` where the file is another one by now."""
    index = _index(folder)
    file = Path(index["source"]["file"])
    if identity(file) != index["source"]:
        raise CorruptFileError(f"{file} has changed since it was read", "start again")
    return {
        name: TensorLocation(
            file, place["dtype"], tuple(place["shape"]), place["offset"], place["bytes"]
        )
        for name, place in index["tensors"].items()
    }


def _index(folder: Path) -> dict[str, Any]:
    """It is this program's own; a folder from elsewhere may have anything by that name."""
    index = read_json(folder / INDEX)
    match index:
        case {"source": {"file": str()}, "tensors": dict(tensors)}:
            pass
        case _:
            raise CorruptFileError(f"{folder / INDEX} is not valid")
    for place in tensors.values():
        match place:
            case {"dtype": str(), "shape": list(shape), "offset": int(first), "bytes": int(size)}:
                if first < 0 or size < 0 or any(type(n) is not int or n < 1 for n in shape):
                    raise CorruptFileError(f"{folder / INDEX} is not valid")
            case _:
                raise CorruptFileError(f"{folder / INDEX} is not valid")
    return index
