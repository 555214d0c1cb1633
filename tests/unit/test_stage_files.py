"""What stages leave on a disk is removed with them, or when a daemon starts that was killed."""

from __future__ import annotations

from pathlib import Path

from confidantd.jobs.stage_files import StageFiles


def test_what_a_killed_daemon_left_goes_and_records_of_jobs_stay(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    own, others = jobs / "aaaaaaaaaaaa", jobs / "bbbbbbbbbbbb"
    for folder in (own, others):
        (folder / "trained-2-1").mkdir(parents=True)
        (folder / "trained-2-1" / "after-7-0.state").write_bytes(b"1234")
        (folder / "turns").touch()
    (own / "job.json").write_text("{}")
    (own / "checkpoints").mkdir()
    StageFiles(tmp_path).forget()
    assert sorted(path.name for path in jobs.rglob("*")) == [
        "aaaaaaaaaaaa", "checkpoints", "job.json",
    ]  # fmt: skip


def test_a_home_without_jobs(tmp_path: Path) -> None:
    StageFiles(tmp_path).forget()
    assert not list(tmp_path.iterdir())
