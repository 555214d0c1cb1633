"""One line on standard error or one JSON object, the right exit status, never a traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.component import cli_answers as answers
from tests.component.cli_support import command, confidant, environment, fake_daemon

ERROR = {"code": "bad-device", "message": "nobody\x1b[2J is not a member", "hint": "see members"}


def one_line(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The line that a failed command printed."""
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("confidant: ")
    assert lines[0].isprintable()
    return lines[0]


def error_object(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The error that a failed command printed as JSON."""
    assert (done.returncode, done.stderr) == (1, "")
    found: dict[str, str] = json.loads(done.stdout)["error"]
    assert set(found) == {"code", "message", "hint"}
    return found


def test_no_daemon(tmp_path: Path) -> None:
    line = one_line(confidant(tmp_path, "status"))
    assert str(tmp_path) in line
    assert "confidantd" in line
    found = error_object(confidant(tmp_path, "status", "--json"))
    assert found["code"] == "daemon-not-running"


def test_a_socket_that_nobody_serves(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "control.sock"))
    assert "confidantd" in one_line(confidant(tmp_path, "peers"))


def test_an_error_of_the_daemon(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"DELETE /v1/members/nobody": {"error": ERROR}}):
        line = one_line(confidant(tmp_path, "remove", "nobody"))
        found = error_object(confidant(tmp_path, "remove", "nobody", "--json"))
    assert line == "confidant: nobody [2J is not a member. see members"
    assert found["code"] == "bad-device"


@pytest.mark.parametrize("answer", [404, 500, {"unexpected": True}])
def test_a_daemon_of_another_version(tmp_path: Path, answer: object) -> None:
    with fake_daemon(tmp_path, {"GET /v1/status": answer}):
        assert "version" in one_line(confidant(tmp_path, "status"))


@pytest.mark.parametrize("words", [("invite",), ("join", "1234"), ("leave",)])
def test_pairing_without_a_daemon_says_so(tmp_path: Path, words: tuple[str, ...]) -> None:
    line = one_line(confidant(tmp_path, *words))
    assert "no daemon is running" in line
    assert error_object(confidant(tmp_path, *words, "--json"))["hint"]


@pytest.mark.parametrize("content", [None, b"\xff\x00"])
def test_a_certificate_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "ben.pem"
    if content is not None:
        file.write_bytes(content)
    with fake_daemon(tmp_path, {}):
        assert str(file) in one_line(confidant(tmp_path, "members", "add", str(file)))


def test_a_certificate_that_cannot_be_written(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"GET /v1/certificate": answers.CERTIFICATE}):
        file = str(tmp_path / "nowhere" / "anna.pem")
        assert file in one_line(confidant(tmp_path, "members", "export", file))


TRAIN = ("train", "model", "--data", "text", "--output", "out")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no-such-command",),
        ("status", "--no-such-option"),
        ("train",),
        ("train", "model", "--output", "out"),
        (*TRAIN, "--steps", "2", "--epochs", "1"),
        (*TRAIN, "--detach", "--wait"),
        (*TRAIN, "--steps", "0"),
        (*TRAIN, "--steps", "1.5"),
        (*TRAIN, "--learning-rate", "-1"),
        (*TRAIN, "--learning-rate", "nan"),
        (*TRAIN, "--method", "half"),
        (*TRAIN, "--schedule", "fast"),
        (*TRAIN, "--devices", " , "),
        ("generate", "model"),
        ("generate", "model", "--prompt", "a", "--top-p", "1.5"),
        ("generate", "model", "--prompt", "a", "--temperature", "inf"),
        ("jobs", "show"),
    ],
)
def test_usage_errors_have_status_two(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: confidant" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"GET /v1/peers": answers.PEERS}):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            command("peers", "--json", "--home", str(tmp_path)),
            stdout=writing, stderr=subprocess.PIPE, text=True, env=environment(), check=False,
        )  # fmt: skip
        os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    with fake_daemon(tmp_path, {"POST /v1/plan": answers.PLAN}):
        done = confidant(tmp_path, "plan", "model", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['confidant', '--help']\n"
        "from confidantd.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'aiohttp', 'rich', 'numpy', 'torch', 'onnxruntime', 'confidantd.daemon'}\n"
        "sys.exit(status or ' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "train" in done.stdout


def test_version() -> None:
    done = subprocess.run(
        command("--version"), capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.startswith("confidant ")
