"""`python -m confidantd.jobs.gguf_import FILE FOLDER`: a model folder for a GGUF file.

The folder gets `config.json`, the tokenizer, and an index of tensors that lie in the file; weights
are not copied. A subprocess of the daemon, since a vocabulary takes much memory while it is read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from confidantd.confinement import confine
from confidantd.errors import ConfidantError, DoesNotFitError, ModelError
from confidantd.jobs.gguf_tokenizer import tokenizer_of
from confidantd.jobs.tokenizer import load_tokenizer
from confidantd.models.folder import read_model
from confidantd.models.gguf import read_gguf
from confidantd.models.gguf_model import config_of, places_of
from confidantd.models.imported import INDEX, identity
from confidantd.store.files import write_atomically


def import_file(file: Path, folder: Path) -> None:
    """Write the files of the folder, and read them back as a job will."""
    source = identity(file)
    header = read_gguf(file)
    config = config_of(header)
    written = {
        "config.json": config,
        INDEX: {"source": source, "tensors": places_of(header, config)},
        **tokenizer_of(header),
    }
    for name, content in written.items():
        write_atomically(folder / name, json.dumps(content).encode())
    try:
        read_model(folder)
        load_tokenizer(folder)
    except ModelError as failure:  # nobody knows this folder
        message, hint = (t.replace(str(folder), str(file)) for t in (failure.message, failure.hint))
        raise type(failure)(message, hint) from None


def main(file: Path, folder: Path) -> int:
    """Exit status 0 if the folder is written, else 1 and an error line."""
    try:
        import_file(file, folder)
    except ConfidantError as failure:
        print(json.dumps({"error": failure.to_wire()}), flush=True)
        return 1
    except MemoryError:
        error = DoesNotFitError(f"there is no memory to read {file}")
        print(json.dumps({"error": error.to_wire()}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    confine()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
