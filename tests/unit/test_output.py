"""The output of a job takes its place whole, and a daemon that is killed knows whether it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from confidantd.errors import OutputError, StorageError
from confidantd.jobs.output import DONE_NAME, OutputFolder, done_event

DONE = {"event": "done", "steps": 3}


class Place:
    """A job's own folder, and where its output shall be."""

    def __init__(self, root: Path) -> None:
        self.job, self.output = root / "0123456789ab", root / "out"
        self.job.mkdir()

    def write(self) -> None:
        """What a job does in the end."""
        with OutputFolder(self.output, self.job, DONE) as folder:
            (folder / "config.json").write_text("{}")

    def done(self) -> object:
        """What another run of the daemon makes of it."""
        return done_event(self.job, str(self.output))

    def rests(self) -> list[str]:
        """Beside job and output."""
        there = {self.job, self.output}
        return [path.name for path in self.job.parent.iterdir() if path not in there]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_it_takes_its_place(place: Place, there: bool) -> None:
    if there:
        place.output.mkdir()
    assert place.done() is None
    place.write()
    assert (place.output / "config.json").read_text() == "{}"
    assert place.done() == DONE
    assert place.rests() == []


def test_killed_before_it_took_its_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        place.write()
    monkeypatch.undo()
    assert (place.job / DONE_NAME).is_file()
    assert place.done() is None
    place.output.mkdir()
    (place.output / "mine.txt").touch()
    assert place.done() is None, "somebody else's files"
    (place.output / "mine.txt").unlink()
    place.write()
    assert place.done() == DONE
    assert place.rests() == []


def test_somebody_writes_there_meanwhile(place: Place) -> None:
    place.output.mkdir()

    def write() -> None:
        with OutputFolder(place.output, place.job, DONE):
            (place.output / "mine.txt").touch()

    with pytest.raises(OutputError, match="cannot write"):
        write()
    assert [path.name for path in place.output.iterdir()] == ["mine.txt"]
    assert place.done() is None
    assert place.rests() == []


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), StorageError("the disk is full")]
)
def test_a_full_disk_is_an_error_of_the_output(place: Place, failure: Exception) -> None:
    """Nothing is trained again for it, and nothing is left."""

    def write() -> None:
        with OutputFolder(place.output, place.job, DONE):
            raise failure

    with pytest.raises(OutputError, match=r"cannot write .* \((No space|the disk is full)"):
        write()
    assert not place.output.exists()
    assert place.done() is None
    assert place.rests() == []


@pytest.mark.parametrize("text", ["", "[]", '{"folder": 1}', '{"folder": [1, 2], "done": {}}'])
def test_a_damaged_word_is_none(place: Place, text: str) -> None:
    place.write()
    (place.job / DONE_NAME).write_text(text)
    assert place.done() is None
