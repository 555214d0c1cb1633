"""`python -m confidantd.jobs.dataset REQUEST.json FOLDER`: text files to token blocks.

A subprocess of the daemon, so that tokenizer and text leave no memory behind. Every
document is tokenised whole without special tokens; documents are joined by the
end-of-text token and cut into blocks of S tokens, the rest is dropped. Writes
`tokens.bin` (int32, little endian) and `dataset.json`; prints progress and errors
as JSON lines.
"""

from __future__ import annotations

import array
import json
import sys
from pathlib import Path
from typing import Any

from confidantd.confinement import confine
from confidantd.errors import ConfidantError, DataError
from confidantd.jobs.documents import documents
from confidantd.jobs.tokenizer import end_of_text, load_tokenizer
from confidantd.models.folder import read_model
from confidantd.store.files import storage_error, write_atomically


def prepare(request: dict[str, Any], folder: Path) -> dict[str, int]:
    """Write the dataset of a request `{"model", "files", "sequence_length"}`; gives its figures.

    `tokens` counts those in whole blocks. `DataError` says what is wrong with the text.
    """
    model = Path(request["model"])
    vocabulary = read_model(model).spec.vocabulary
    files = [Path(name) for name in request["files"]]
    tokens, documents_read = _tokenise(model, files)
    _check_vocabulary(tokens, vocabulary)
    length = int(request["sequence_length"])
    blocks = len(tokens) // length
    if not blocks:
        raise DataError(
            f"the text has {len(tokens)} tokens, fewer than one block of {length}",
            "give more text or lower --sequence-length",
        )
    del tokens[blocks * length :]
    figures = {
        "tokens": len(tokens),
        "blocks": blocks,
        "documents": documents_read,
        "sequence_length": length,
    }
    _write(folder, tokens, figures)
    _say({"progress": "", "done": len(files), "of": len(files)})
    return figures


def _tokenise(model: Path, files: list[Path]) -> tuple[array.array[int], int]:
    """Tokens of all documents with the end-of-text token between them, and their number."""
    tokenizer = load_tokenizer(model)
    end = end_of_text(model, tokenizer)
    tokens = array.array("i")
    count = 0
    for index, path in enumerate(files):
        _say({"progress": path.name, "done": index, "of": len(files)})
        for document in documents(path):
            if count and end is not None:
                tokens.append(end)
            tokens.extend(tokenizer.encode(document, add_special_tokens=False).ids)
            count += 1
    return tokens, count


def _check_vocabulary(tokens: array.array[int], vocabulary: int) -> None:
    largest = max(tokens, default=0)
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model knows {vocabulary} tokens",
            "the tokenizer files do not belong to this model",
        )


def _write(folder: Path, tokens: array.array[int], figures: dict[str, int]) -> None:
    """`dataset.json` last, and never beside the tokens of another run: it says all is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").unlink(missing_ok=True)
    except OSError as failure:
        raise storage_error(folder, failure) from None
    if sys.byteorder == "big":
        tokens.byteswap()
    write_atomically(folder / "tokens.bin", memoryview(tokens))
    write_atomically(folder / "dataset.json", json.dumps(figures).encode())


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> int:
    """Exit status 0 if the dataset is written, else 1 and an error line."""
    try:
        prepare(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    except ConfidantError as failure:
        _say({"error": failure.to_wire()})
        return 1
    return 0


if __name__ == "__main__":
    confine()
    sys.exit(main())
